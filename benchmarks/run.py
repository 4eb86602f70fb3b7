"""Run the benchmarks one after the other and write the table, the ratios and the plots.

python benchmarks/run.py            # everything, at most 15 minutes on 2 cores: RESULTS.md, results.json, plots
python benchmarks/run.py --quick    # smaller states and fewer rounds, 3 minutes; writes nothing
python benchmarks/run.py --check    # the quick ones, compared with the committed ratios
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS, RATIOS = HERE / "RESULTS.md", HERE / "results.json"
TOLERANCE = 1.25

# what to run, in full and quick; each appends its rows to a file
COMMANDS = {
    "blocked.py": (["--no-pylint", "run", "--rounds", "9"], ["--no-pylint", "run", "--sizes", "1,50", "--rounds", "5"]),
    "cost.py": (["--no-pylint", "run"], ["--no-pylint", "run", "--saves", "100", "--rounds", "3"]),
    "restart.py": (["compare", "--rounds", "5"], ["compare", "--rounds", "3"]),
    "task_end.py": (["compare", "--rounds", "5"], None),
    "position.py": ([], ["--rounds", "5"]),
    "adapters.py": ([], ["--only", "keras,xgboost", "--saves", "6"]),
    "s3.py": ([], ["--quick"]),
}


def run(quick, only):
    """The rows of all benchmarks, in the order in which they ran."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        environment = {
            **os.environ, "METAFLOW_DATASTORE_SYSROOT_LOCAL": name, "METAFLOW_HOME": str(folder / "home"),
            "METAFLOW_USER": "benchmark", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2", "BENCHMARK_DIRECTORY": name,
        }  # fmt: skip
        for variable in ("METAFLOW_DEFAULT_DATASTORE", "METAFLOW_DEFAULT_METADATA", "FAULTS"):
            environment.pop(variable, None)
        file = folder / "rows.json"
        for script, arguments in COMMANDS.items():
            options = arguments[quick]
            if options is None or (only and script.removesuffix(".py") not in only):
                continue
            print(f"--- {script} {' '.join(options)}", flush=True)
            began = time.monotonic()
            subprocess.run([sys.executable, HERE / script, *options, "--json", file], cwd=folder, env=environment,
                           check=True)  # fmt: skip
            print(f"    {time.monotonic() - began:.0f} s", flush=True)
        return json.loads(file.read_text())


def machine():
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    packages = ("torch", "metaflow", "metaflow-checkpoint", "numpy", "lightning", "transformers", "keras", "xgboost")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    cores = len(os.sched_getaffinity(0))
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{cpu}, {cores} cores, {memory:.0f} GB, {system}, {versions}"


def number(value, unit="x"):
    text = f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{text}x" if unit == "x" else f"{text}{unit}"


def table(rows):
    """The rows as Markdown."""
    lines = ["| what | against | measured | goal | met | medians |", "|---|---|---|---|---|---|"]
    for row in rows:
        values = ", ".join(f"{name}: {number(value, '')}" for name, value in row["values"].items())
        met = "yes" if row["ratio"] <= row["goal"] else f"**no, by {row['ratio'] / row['goal']:.2f}x**"
        lines.append(f"| {row['what']} | {row['against']} | {number(row['ratio'], row['unit'])} | "
                     f"{number(row['goal'], row['unit'])} | {met} | {values} |")  # fmt: skip
    return "\n".join(lines)


def write(rows, seconds):
    """RESULTS.md between its markers, the ratios, and the plots. What people wrote beside the table stays."""
    loads = [row["load"] for row in rows]
    text = (
        f"Measured on {date.today()} by `make bench` in {seconds / 60:.0f} minutes; load average {min(loads):.1f} "
        f"to {max(loads):.1f}. {machine()}. Milliseconds where nothing else is said.\n\n{table(rows)}\n"
    )
    begin, end = "<!-- measured -->\n", "<!-- /measured -->"
    page = RESULTS.read_text()
    RESULTS.write_text(page[: page.index(begin) + len(begin)] + text + page[page.index(end) :])
    RATIOS.write_text(json.dumps(rows, indent=1) + "\n")
    plots(rows)


def plots(rows):
    """How long each way blocks the training thread, and how long it takes to restore: one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted = {row["what"]: row["values"] for row in rows
              if row["what"].startswith(("blocked by a save", "restore into"))}  # fmt: skip
    rows_of_axes = -(-len(wanted) // 3)
    figure, axes = pyplot.subplots(rows_of_axes, 3, figsize=(10, 2.5 * rows_of_axes), squeeze=False)
    for axis in axes.flat[len(wanted) :]:
        axis.axis("off")
    for axis, (what, values) in zip(axes.flat, wanted.items(), strict=False):
        names = list(values)[::-1]
        axis.barh(names, [values[name] for name in names],
                  color=["#d9822b" if name == "common" else "#8a9ba8" for name in names])  # fmt: skip
        for place, name in enumerate(names):
            axis.text(values[name], place, f" {number(values[name], '')}", va="center", fontsize=7)
        axis.set_title(what, fontsize=9, loc="left")
        axis.set_xlabel("ms", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "blocked.png", dpi=130)


def compare(rows):
    """Exit with 1 when a ratio is more than a quarter above the committed one."""
    if not RATIOS.exists():
        raise SystemExit(f"there is no {RATIOS.name} to compare with: run make bench on a quiet machine and commit it")
    committed = {(row["what"], row["against"]): row for row in json.loads(RATIOS.read_text())}
    worse, compared = [], 0
    for row in rows:
        old = committed.get((row["what"], row["against"]))
        if old is None or row["unit"] != "x":
            continue
        compared += 1
        if row["ratio"] > TOLERANCE * max(old["ratio"], 0.01):
            worse.append(f"{row['what']} against {row['against']}: {old['ratio']:.3g}x -> {row['ratio']:.3g}x")
    print(f"{compared} ratios compared with the committed ones, {len(worse)} more than 25% above them")
    for line in worse:
        print(f"  {line}")
    if not compared:
        raise SystemExit("nothing was compared: no row is in the committed results")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", action="append", help="one benchmark (may be repeated); writes nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    measured = run(arguments.quick or arguments.check, arguments.only)
    print(table(measured))
    if arguments.check:
        compare(measured)
    if not (arguments.quick or arguments.only):
        write(measured, time.monotonic() - started)
