"""Run the benchmarks one after the other and write the table, the ratios and the plots.

python benchmarks/run.py            # everything, at most 15 minutes on 2 cores: RESULTS.md, results.json, plots
python benchmarks/run.py --quick    # smaller states and fewer rounds, 3 minutes; writes nothing
python benchmarks/run.py --check    # the quick ones; what is worse than the committed ratio once more with all rounds
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

# what to run, in full and quick; each writes its rows to a file
COMMANDS = {
    "blocked.py": (["--no-pylint", "run", "--rounds", "9"], ["--no-pylint", "run", "--sizes", "1,50", "--rounds", "5"]),
    "cost.py": (["--no-pylint", "run"], ["--no-pylint", "run", "--saves", "100", "--rounds", "3"]),
    "restart.py": (["compare", "--rounds", "5"], ["compare", "--rounds", "3"]),
    "task_end.py": (["compare", "--rounds", "5"], None),
    "position.py": ([], ["--rounds", "5"]),
    "adapters.py": ([], ["--only", "keras,xgboost", "--saves", "6"]),
    "s3.py": ([], ["--quick"]),
}


def chosen(quick, only=None):
    """The scripts to run, with their options."""
    return {
        script: options[quick]
        for script, options in COMMANDS.items()
        if options[quick] is not None and (not only or script.removesuffix(".py") in only)
    }


def run(scripts):
    """The rows of these scripts, in the order in which they ran; each says which one it is from."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        environment = {
            **os.environ, "METAFLOW_DATASTORE_SYSROOT_LOCAL": name, "METAFLOW_HOME": str(folder / "home"),
            "METAFLOW_USER": "benchmark", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2", "BENCHMARK_DIRECTORY": name,
        }  # fmt: skip
        for variable in ("METAFLOW_DEFAULT_DATASTORE", "METAFLOW_DEFAULT_METADATA", "FAULTS"):
            environment.pop(variable, None)
        for script, options in scripts.items():
            print(f"--- {script} {' '.join(options)}", flush=True)
            began, file = time.monotonic(), folder / f"{script}.json"
            subprocess.run([sys.executable, HERE / script, *options, "--json", file], cwd=folder, env=environment,
                           check=True)  # fmt: skip
            rows += [{**row, "script": script.removesuffix(".py")} for row in json.loads(file.read_text())]
            print(f"    {time.monotonic() - began:.0f} s", flush=True)
    return rows


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


def worse(rows):
    """The rows more than a quarter above the committed ratio, with that one; and how many have one.

    What the rounds disagree about is no proof: a row is worse when its better quarter is.
    """
    if not RATIOS.exists():
        raise SystemExit(f"there is no {RATIOS.name} to compare with: run make bench on a quiet machine and commit it")
    committed = {(row["what"], row["against"]): row["ratio"] for row in json.loads(RATIOS.read_text())}
    pairs = [(row, committed.get((row["what"], row["against"]))) for row in rows if row["unit"] == "x"]
    pairs = [(row, old) for row, old in pairs if old is not None]
    found = [
        (row["ratio"] if row["least"] is None else min(row["least"], row["ratio"]), row, old) for row, old in pairs
    ]
    return [(row, old) for ratio, row, old in found if ratio > TOLERANCE * max(old, 0.01)], len(pairs)


def compare(rows):
    """Exit with 1 when a ratio is more than a quarter above the committed one, and still is with all rounds.

    A few rounds on a noisy machine are no proof; what they find worse is measured again as the committed one was.
    """
    suspects, compared = worse(rows)
    if not compared:
        raise SystemExit("nothing was compared: no row is in the committed results")
    print(f"{compared} ratios compared with the committed ones, {len(suspects)} more than 25% above them", flush=True)
    if not suspects:
        return
    names = {(row["what"], row["against"]) for row, _ in suspects}
    again = run(chosen(quick=False, only={row["script"] for row, _ in suspects}))
    proven, _ = worse([row for row in again if (row["what"], row["against"]) in names])
    print(f"{len(proven)} of these {len(suspects)} when measured again with all rounds")
    for row, old in proven:
        print(f"  {row['what']} against {row['against']}: {old:.3g}x -> {row['ratio']:.3g}x")
    raise SystemExit(1 if proven else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", action="append", help="one benchmark (may be repeated); writes nothing")
    arguments = parser.parse_args()
    started = time.monotonic()
    measured = run(chosen(arguments.quick or arguments.check, arguments.only))
    print(table(measured))
    if arguments.check:
        compare(measured)
    elif not (arguments.quick or arguments.only):
        write(measured, time.monotonic() - started)
