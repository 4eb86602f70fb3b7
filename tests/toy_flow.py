"""A flow around toy.py. Its steps do to the datastore, between and during attempts, what tests want to see survived."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import toy
from metaflow import FlowSpec, Parameter, checkpoint, current, model, retry, step

import common

CHILD = """
import sys; sys.path.insert(0, {tests!r})
import metaflow, numpy as np, toy
from common import CheckpointManager
with CheckpointManager(metaflow.Checkpoint(), save_every=1, keep_last=50) as checkpoints:
    state = toy.new_state()
    checkpoints.restore(state, toy.CONFIG)
    state.step, state.objects["model"].value[:] = {first}, {first}
    for number in range(5):
        checkpoints.step(state)
"""


class ToyFlow(FlowSpec):
    case = Parameter("case", default="train")
    resume_from = Parameter("resume-from", default="")
    branches = Parameter("branches", default=1)

    @step
    def start(self):
        self.indices = list(range(self.branches))
        self.next(self.train, foreach="indices")

    @retry(times=4, minutes_between_retries=0)
    @model
    @checkpoint(load_policy="none", show_card=False)
    @step
    def train(self):
        common.die_with_parent()
        self.checks = {}
        getattr(self, f"do_{self.case}", self.do_train)()
        self.next(self.use)

    def do_train(self):
        with common.CheckpointManager(
            current.checkpoint, save_every=1, keep_best=("loss", "min"), resume_from=self.resume_from
        ) as checkpoints:
            state = toy.train(checkpoints)
        self.digest, self.history = toy.digest(state)
        self.resumed_from = checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest

    def do_slow(self):
        """Steps that take a while, saved only when asked to stop."""
        with common.CheckpointManager(current.checkpoint, save_every=10_000) as checkpoints:
            state = toy.new_state()
            checkpoints.restore(state, toy.CONFIG)
            while state.step < 40:
                time.sleep(0.2)
                checkpoints.step(state)
                print(f"step {state.step}", flush=True)
        self.digest, self.history, self.resumed_from = "", [], checkpoints.resumed_from
        self.latest_checkpoint = checkpoints.latest

    def do_damage(self):
        """Each attempt finds the store damaged in another way."""
        root = Path(metaflow_root(), "mf.checkpoints", "checkpoints")
        records = sorted((root / "metadata" / current.pathspec).glob("*.metadata"), key=lambda p: p.name.split(".")[2])
        if current.retry_count == 1:
            for path in root.rglob("latest"):
                path.write_bytes(b"")
        elif current.retry_count == 2:
            records[-1].write_bytes(b'{"url"')
        elif current.retry_count == 3:
            path = Path(json.loads(records[-1].read_text())["url"], "state.safetensors")
            path.chmod(0o644)
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(bytes(data))
        elif current.retry_count == 4:
            shutil.rmtree(json.loads(records[-1].read_text())["url"])
            manifests = [Path(json.loads(record.read_text())["url"], "manifest.json") for record in records[:-1]]
            losses = {path: json.loads(path.read_text())["metrics"].get("loss", math.inf) for path in manifests}
            best = min(losses, key=losses.get).with_name("state.json")
            best.chmod(0o644)
            best.write_text("{}")
            torn = Path(json.loads(records[-2].read_text())["url"])
            name = torn.name.split(".")
            torn.with_name(f"{name[0]}.0.step-00000099.1").mkdir()  # what a kill in mid-commit leaves
            (torn.with_name(f"{name[0]}.0.step-00000099.1") / "state.json").write_text("{}")
        self.do_train()
        self.checks["torn"] = [p.name for p in root.rglob("*.0.step-00000099.1")]

    def do_contract(self):
        """Both directions between the manager and the library's own API."""
        import metaflow

        made = Path(current.checkpoint.directory, "own")
        made.mkdir()
        (made / "weights.bin").write_text("plain")
        plain = current.checkpoint.save(str(made), name="mine")
        from common.metaflow_store import _Library as library

        copied = []
        before, shutil.copy = shutil.copy, lambda *a, **k: copied.append(a) or before(*a, **k)
        self.do_train()
        shutil.copy = before
        checks = self.checks
        checks["copies"] = len(copied)
        with common.CheckpointManager(current.checkpoint, save_every=1, keep_best=("loss", "min")) as checkpoints:
            checkpoints.restore(toy.new_state(), toy.CONFIG)
            latest = checkpoints.latest
            checks["private"] = checkpoints._store._library.private is not None
            files = checkpoints.load_files(plain)
            checks["plain"] = (files / "weights.bin").read_text()
            (files / "weights.bin").write_text("changed")
            checks["plain_again"] = (checkpoints.load_files(plain) / "weights.bin").read_text()
            tar = current.checkpoint.save(str(made), name="packed", storage_format="tar")
            try:
                checkpoints.load_files(tar)
            except common.CheckpointError as error:
                checks["tar"] = str(error)
        names = [record["name"] for record in current.checkpoint.list()]
        checks["listed"] = names
        checks["newest_first"] = metaflow.Checkpoint().list()[0] == latest
        checks["types"] = sorted({type(record["attempt"]).__name__ for record in current.checkpoint.list()})
        into = Path(current.tempdir or ".", "loaded")
        current.checkpoint.load(latest, path=str(into))
        checks["loaded"] = sorted(path.name for path in into.iterdir())
        checks["writable"] = [path.name for path in into.iterdir() if path.resolve().stat().st_mode & 0o222]
        # the way back: a version of the library that has moved its private parts
        library._private_parts = lambda self, attempt: None
        with common.CheckpointManager(current.checkpoint, save_every=1, keep_best=("loss", "min")) as checkpoints:
            state = toy.new_state()
            checkpoints.restore(state, toy.CONFIG)
            checks["fallback_resumed"] = state.step
            checkpoints.step(state)
            checkpoints.step(state)
        checks["fallback_latest"] = checkpoints.latest["metadata"]["step"]
        self.latest_checkpoint = checkpoints.latest
        with common.CheckpointManager(current.checkpoint) as checkpoints:
            state = toy.new_state()
            checkpoints.restore(state, toy.CONFIG)
            checks["fallback_restored"] = state.step

    def do_twice(self):
        """Two trainings in one step, as in a loop over folds."""
        self.do_train()
        for config in (toy.CONFIG, {**toy.CONFIG, "fold": 1}):
            try:
                with common.CheckpointManager(current.checkpoint) as checkpoints:
                    toy.train(checkpoints, config=config)
            except common.CheckpointError as error:
                self.checks[f"fold {len(self.checks)}"] = str(error)
        with common.CheckpointManager(current.checkpoint, allow_changes=True) as checkpoints:
            self.checks["on purpose"] = toy.train(checkpoints, steps=16, config={**toy.CONFIG, "fold": 2}).step

    def do_children(self):
        """Three processes of one task save at the same time."""
        tests = str(Path(__file__).parent)
        children = [
            subprocess.Popen([sys.executable, "-c", CHILD.format(tests=tests, first=first)])
            for first in (100, 200, 300)
        ]
        self.checks["exits"] = [child.wait() for child in children]
        with common.CheckpointManager(current.checkpoint, keep_last=50) as checkpoints:
            for record in current.checkpoint.list():
                tree = checkpoints.load_state(record)
                step = record["metadata"]["step"]
                assert tree["train_state"]["step"] == step and (tree["model"]["value"] == step // 100 * 100).all()
        self.checks["saved"] = sorted(record["metadata"]["step"] for record in current.checkpoint.list())
        self.digest, self.history, self.resumed_from = "", [], []
        self.latest_checkpoint = current.checkpoint.list()[0]

    @model(load="latest_checkpoint")
    @step
    def use(self):
        directory = Path(current.model.loaded["latest_checkpoint"])
        self.files = sorted(path.name for path in directory.iterdir())
        self.next(self.join)

    @step
    def join(self, inputs):
        for name in ("digest", "history", "resumed_from", "checks", "files", "latest_checkpoint"):
            setattr(self, name, [getattr(branch, name) for branch in inputs])
        self.next(self.end)

    @step
    def end(self):
        pass


class CardFlow(FlowSpec):
    """What the manager refuses: the library's own card lists what the manager deletes."""

    @checkpoint
    @step
    def start(self):
        with common.CheckpointManager(current.checkpoint):
            pass
        self.next(self.end)

    @step
    def end(self):
        pass


def metaflow_root() -> str:
    """The root of the local datastore."""
    from metaflow.plugins.datastores.local_storage import LocalStorage

    return LocalStorage.get_datastore_root_from_config(print)


if __name__ == "__main__":
    CardFlow() if os.environ.get("TOY") == "card" else ToyFlow()
