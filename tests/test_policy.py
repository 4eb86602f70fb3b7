"""When a checkpoint is due and which ones are kept."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import CheckpointError
from common.policy import KeepBest, SaveEvery, to_delete


@dataclass(frozen=True)
class Entry:
    sequence: int
    metrics: dict[str, Any] = field(default_factory=dict, hash=False)
    name: str | None = None
    step: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", self.step if self.step >= 0 else self.sequence)


@pytest.mark.parametrize(
    ("text", "steps", "seconds"),
    [(20, 20, None), ("20", 20, None), ("90s", None, 90), ("10m", None, 600), ("1.5h", None, 5400),
     ("500,10m", 500, 600), ("", None, None), (None, None, None)],
)  # fmt: skip
def test_intervals_are_read(text, steps, seconds):
    assert SaveEvery.parse(text) == SaveEvery(steps, seconds)


@pytest.mark.parametrize("text", ["0", "0s", "-3", "ten", "10 steps", "5d", "3,,4x", "1e3", -5, 0])
def test_bad_intervals_are_refused(text):
    with pytest.raises(CheckpointError, match="save_every is"):
        SaveEvery.parse(text)


def test_due_by_steps_and_by_time(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: 100.0)
    assert SaveEvery(steps=3).due(9, 0) and not SaveEvery(steps=3).due(10, 0)
    assert SaveEvery(seconds=5).due(1, 95.0) and not SaveEvery(seconds=5).due(1, 95.1)
    assert SaveEvery(steps=3, seconds=5).due(10, 90) and not SaveEvery().due(10, 0)


@given(
    st.lists(st.none() | st.floats(-5, 5), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from(["min", "max"]),
    st.sets(st.integers(0, 11)),
)
def test_the_newest_the_best_and_the_named_stay(values, last, count, mode, named):
    entries = [
        Entry(i, {} if value is None else {"loss": value}, "mine" if i in named else None)
        for i, value in enumerate(values)
    ]
    best = KeepBest("loss", mode, count)
    gone = {entry.sequence for entry in to_delete(entries, last, best)}
    kept = [entry for entry in entries if entry.sequence not in gone]
    assert {entry.sequence for entry in entries[-last:]} <= {entry.sequence for entry in kept}
    assert all(entry in kept for entry in entries if entry.name)
    scored = [entry.metrics["loss"] for entry in entries if entry.metrics]
    if scored:
        extreme = min(scored) if mode == "min" else max(scored)
        assert extreme in [entry.metrics.get("loss") for entry in kept]
    assert len([entry for entry in kept if not entry.name]) <= last + count


def test_of_equals_the_earlier_is_the_best():
    assert [e.sequence for e in KeepBest("a", "max").rank([Entry(0, {"a": 1}), Entry(1, {"a": 1})])] == [0, 1]


def test_bad_directions_are_refused():
    with pytest.raises(CheckpointError, match="'min' or 'max'"):
        KeepBest("loss", "lower")
    with pytest.raises(CheckpointError, match="1 or more"):
        KeepBest("loss", "min", 0)


def test_of_one_step_the_newer_stands_for_both():
    """With keep_last=2 two different steps are left, also right after the end of an epoch."""
    entries = [Entry(0, step=7), Entry(1, step=8), Entry(2, {"loss": 1.0}, step=8)]
    assert [entry.sequence for entry in to_delete(entries, 2, None)] == [1]
