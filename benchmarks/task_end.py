"""From the end of the user's code to the end of the task, above a plain step.

python benchmarks/task_end.py compare --rounds 5
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from measure import Row, medians, report, take_turns

KINDS = ("plain", "common", "common with the report card", "@checkpoint", "@checkpoint(show_card=False)")
FLOW = """
import os, time
from pathlib import Path
from metaflow import FlowSpec, card, checkpoint, current, step
import common

class TaskEndBenchmark(FlowSpec):
    {decorators}
    @step
    def start(self):
        {body}
        Path(os.environ["BENCHMARK_TIMES"]).write_text(str(time.time()))
        self.next(self.end)

    @step
    def end(self):
        pass

if __name__ == "__main__":
    TaskEndBenchmark()
"""
TRAIN = """import numpy as np
        class Model:
            weights = np.ones(10000)
            def state_dict(self): return {{"weights": self.weights}}
            def load_state_dict(self, state): self.weights = state["weights"]
        state = common.TrainState(model=Model())
        with common.CheckpointManager(current.checkpoint, save_every=50{card}) as checkpoints:
            checkpoints.restore(state, total_steps=100)
            for _ in range(100):
                time.sleep(0.02)
                checkpoints.step(state, {{"loss": 1.0}})"""
PLAIN = "time.sleep(2)"
TODAY = """time.sleep(2)
        path = Path(current.checkpoint.directory) / "weights"
        path.write_bytes(b"x" * 80000)
        current.checkpoint.save(str(path.parent))"""
OURS = '@checkpoint(load_policy="none", show_card=False)'
SOURCES = {
    "plain": ("", PLAIN),
    "common": (OURS, TRAIN.format(card="")),
    "common with the report card": (
        f'{OURS}\n    @card(type="blank", id="training", refresh_interval=1)',
        TRAIN.format(card=', card=current.card["training"]'),
    ),
    "@checkpoint": ("@checkpoint", TODAY),
    "@checkpoint(show_card=False)": ("@checkpoint(show_card=False)", TODAY),
}


def seconds_to_the_end(kind):
    decorators, body = SOURCES[kind]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "flow.py").write_text(FLOW.format(decorators=decorators, body=body))
        environment = {**os.environ, "BENCHMARK_TIMES": str(folder / "ended"), "METAFLOW_HOME": str(folder / "home"),
                       "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder), "METAFLOW_USER": "benchmark"}  # fmt: skip
        done = subprocess.run([sys.executable, "flow.py", "--no-pylint", "run"], cwd=folder, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        ended = re.search(r"^(\S+ \S+) .*/start/.*Task finished successfully", done.stdout, re.MULTILINE)
        if not ended:
            raise SystemExit(done.stdout + done.stderr)
        at = datetime.fromisoformat(ended[1]).timestamp()
        return max(0.0, at - float((folder / "ended").read_text()))


def compare(arguments):
    ways = {kind: (lambda kind=kind: seconds_to_the_end(kind)) for kind in KINDS}
    values = medians(take_turns(ways, arguments.rounds, warm_up=0), factor=1)
    rows = [
        Row("end of the user's code to the end of the task", "a plain step", values["common"] - values["plain"], 0.7,
            values, " s more"),
        Row("the same with the report card", "a plain step",
            values["common with the report card"] - values["plain"], 1.3, values, " s more"),
    ]  # fmt: skip
    report(rows, arguments.json)


if __name__ == "__main__":
    time.tzset()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["compare"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="")
    compare(parser.parse_args())
