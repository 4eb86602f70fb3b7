"""Whatever happens in whatever order, the newest valid checkpoint and the best one are never lost."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import toy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from test_checkpoint import damage

import common.checkpoint
from common import FaultInjected
from common.manifest import Manifest, verify

_STEPS, _EPOCH = 60, 3


class Lives(RuleBasedStateMachine):
    """Random attempts that die, random damage, random retention."""

    losses: dict[int, float] = {}

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.reached = 0
        if not Lives.losses:
            straight = Path(tempfile.mkdtemp())
            history = toy.run(straight, steps=_STEPS, epoch_steps=_EPOCH)[1]
            Lives.losses = {record["step"]: record["loss"] for record in history if "loss" in record}
            Lives.history = history
            shutil.rmtree(straight)

    def valid(self) -> dict[str, Manifest]:
        found = {}
        for path in self.directory.glob("step-*"):
            try:
                manifest = Manifest.read(path)
                verify(path, manifest)
            except Exception:
                continue
            found[path.name] = manifest
        return found

    @precondition(lambda self: self.reached < _STEPS)
    @rule(more=st.integers(1, 7), every=st.integers(1, 4), keep=st.integers(1, 3), in_save=st.booleans())
    def attempt(self, more: int, every: int, keep: int, in_save: bool) -> None:
        """An attempt that gets ``more`` steps further and dies, perhaps leaving a half-written checkpoint behind."""
        before = self.valid()
        newest = max(before.values(), key=lambda manifest: manifest.sequence, default=None)
        start = newest.step if newest else 0
        self.reached = start + more
        os.environ["FAULTS"] = f"raise@step={start + more},attempt={len(list(self.directory.glob('events/*')))}"
        try:
            toy.run(self.directory, steps=_STEPS, epoch_steps=_EPOCH, save_every=every, keep_last=keep)
        except FaultInjected:
            pass
        finally:
            del os.environ["FAULTS"]
        if in_save:  # as SIGKILL in the middle of a write leaves it: staged, without a manifest
            torn = self.directory / ".staging" / "scratch-torn" / "1"
            torn.mkdir(parents=True, exist_ok=True)
            (torn / "state.safetensors").write_bytes(b"half")
        after = self.valid()
        said = max(after.values(), key=lambda manifest: manifest.sequence, default=None)
        saved_new = said is not None and (newest is None or said.sequence > newest.sequence)
        assert newest is None or said is not None, "the newest valid checkpoint was lost"
        assert newest is None or saved_new or said.sequence == newest.sequence
        # the best that was there, or was saved since, is there; the epoch that start is the edge of may end once more
        known = {m.metrics["loss"] for m in before.values() if "loss" in m.metrics}
        known |= {self.losses[step] for step in self.losses if start <= step < self.reached}
        here = {m.metrics["loss"] for m in after.values() if "loss" in m.metrics}
        assert not known or min(here, default=None) == min(known), "the best checkpoint was lost"

    @rule(data=st.data(), how=st.sampled_from(["missing", "empty", "truncated", "flipped"]))
    def break_one(self, data: st.DataObject, how: str) -> None:
        """Something damages a file of a checkpoint."""
        files = sorted(self.directory.glob("step-*/*"))
        if files:
            path = data.draw(st.sampled_from(files))
            if path.stat().st_size > 10:
                damage(path, how)

    @rule()
    def finish(self) -> None:
        """A life without a fault ends as if nothing had ever happened."""
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(self.directory, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
            assert toy.run(Path(copy), steps=_STEPS, epoch_steps=_EPOCH)[1] == self.history

    @invariant()
    def no_more_than_kept(self) -> None:
        assert len(list(self.directory.glob("step-*"))) < 20

    def teardown(self) -> None:
        shutil.rmtree(self.directory)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_retention_that_forgets_the_best_is_caught(monkeypatch, tmp_path, forgets):
    """Negative control of the machine's check: without keep_best the best one is gone."""
    keep = common.checkpoint.to_delete
    if forgets:
        monkeypatch.setattr(common.checkpoint, "to_delete", lambda entries, last, best: keep(entries, last, None))
    history = toy.run(tmp_path, steps=_STEPS, epoch_steps=_EPOCH)[1]
    best = min(record["loss"] for record in history if "loss" in record)
    kept = [Manifest.read(path.parent).metrics.get("loss") for path in tmp_path.glob("*/manifest.json")]
    assert (best in kept) != forgets
