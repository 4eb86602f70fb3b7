"""From SIGKILL to the first new step, beside a bare script that somebody starts again by hand.

python benchmarks/restart.py compare --rounds 5

restart_flow.py is the flow that is killed, ``restart.py bare`` the script. Both train the same model, save at every
tenth step, and write the time of each step to a file.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, KILL_AT, SAVE_EVERY = 30, 15, 10


def training(save, model, optimizer, position):
    """Train to the end; write when each step was done."""
    import torch

    batch = torch.randn(4, 16, next(model.parameters()).shape[-1])
    with open(os.environ["BENCHMARK_TIMES"], "a", buffering=1) as times:
        while position() < STEPS:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            times.write(f"{position() + 1} {time.time()}\n")
            save()


def bare():
    """What people write: one file, written beside and renamed, no hashes, no history, no random states."""
    import torch
    from measure import model_and_adam, state_dicts

    torch.set_num_threads(1)
    path = Path(os.environ["BENCHMARK_STATE"])
    model, optimizer = model_and_adam(float(os.environ["BENCHMARK_MEGABYTES"]))
    done = [0]
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done[0] = saved["step"]
        first = False
    else:
        first = True

    def save():
        done[0] += 1
        if done[0] % SAVE_EVERY == 0:
            torch.save({**state_dicts(model, optimizer), "step": done[0]}, f"{path}.new")
            os.replace(f"{path}.new", path)
        if first and done[0] == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    training(save, model, optimizer, lambda: done[0])


def times_of(path):
    """Seconds from the last step before the kill to the first one after it."""
    lines = [line.split() for line in path.read_text().splitlines()]
    steps = [(int(step), float(at)) for step, at in lines]
    for (before, killed), (after, resumed) in zip(steps, steps[1:], strict=False):
        if after <= before:
            return resumed - killed
    raise SystemExit(f"nothing was trained twice: {steps}")


def compare(arguments):
    from measure import Row, least, medians, report, take_turns

    parts = []

    def environment(folder, **more):
        return {**os.environ, "BENCHMARK_TIMES": str(folder / "times"), "BENCHMARK_STATE": str(folder / "state.pt"),
                "BENCHMARK_MEGABYTES": str(arguments.megabytes), "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
                "METAFLOW_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "METAFLOW_USER": "benchmark",
                **more}  # fmt: skip

    def flow():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, str(Path(__file__).with_name("restart_flow.py")), "run"]
            done = subprocess.run(command, env=environment(folder, FAULTS=f"kill@step={KILL_AT},attempt=0"),
                                  capture_output=True, text=True)  # fmt: skip
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            parts.append(json.loads((folder / "times.own").read_text()))
            return times_of(folder / "times")

    def bare_script():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, __file__, "bare"]
            subprocess.run(command, env=environment(folder), check=False)
            subprocess.run(command, env=environment(folder), check=True)
            return times_of(folder / "times")

    seconds = take_turns({"common": flow, "bare script": bare_script}, arguments.rounds)
    values = medians(seconds)
    own = statistics.median(parts) * 1000
    values["find, verify, load, restore"] = own
    report(
        [
            Row(f"SIGKILL to the first new step, {arguments.megabytes:.3g} MB", "a bare script started by hand",
                values["common"] / values["bare script"], 1.6, values,
                least=least(seconds["common"], seconds["bare script"])),
            Row("our own part of that", "the whole", own / values["common"], 0.1, values),
        ],
        arguments.json,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["compare", "bare"])
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    bare() if arguments.what == "bare" else compare(arguments)
