"""When a checkpoint is due and which ones are kept. Pure functions of numbers, so that every rule can be tested."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from .errors import CheckpointError

_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class SaveEvery:
    """An interval in steps, in seconds, or both; None in both means at the end of each epoch."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, value: "int | str | SaveEvery | None") -> "SaveEvery":
        """``20`` or ``"20"``: steps; ``"90s"``, ``"10m"``, ``"2h"``: time; ``"500,10m"``: whichever comes first."""
        if isinstance(value, SaveEvery):
            return value
        steps: int | None = None
        seconds: float | None = None
        for part in str("" if value is None else value).replace(" ", "").split(","):
            if re.fullmatch(r"[0-9]+", part) and steps is None:
                steps = int(part)
            elif (match := re.fullmatch(r"([0-9]*\.?[0-9]+)([smh])", part)) and seconds is None:
                seconds = float(match[1]) * _UNITS[match[2]]
            elif part or value not in (None, ""):
                raise CheckpointError(
                    f"save_every is {value!r}: write a number of steps (20), a time (90s, 10m, 2h), or both (500,10m)"
                )
        if steps == 0 or seconds == 0:
            raise CheckpointError(f"save_every is {value!r}: the interval must be larger than zero")
        return cls(steps, seconds)

    @property
    def per_epoch(self) -> bool:
        """Whether checkpoints are saved at the end of each epoch only."""
        return self.steps is None and self.seconds is None

    def due(self, steps_done: int, last_save: float) -> bool:
        """Whether to save after step ``steps_done``; ``last_save`` is the ``time.monotonic()`` of the last one."""
        return (self.steps is not None and steps_done % self.steps == 0) or self.overdue(last_save)

    def overdue(self, last_save: float) -> bool:
        """Whether the time since the last save is over."""
        return self.seconds is not None and time.monotonic() - last_save >= self.seconds


@dataclass(frozen=True)
class KeepBest:
    """Keep the ``count`` checkpoints with the best ``metric``; ``mode`` is ``"min"`` or ``"max"``."""

    metric: str
    mode: str
    count: int = 1

    @classmethod
    def parse(cls, value: Any) -> "KeepBest | None":
        """``(metric, direction)`` or ``(metric, direction, count)``; nothing gives None."""
        if not value or isinstance(value, KeepBest):
            return value or None
        parts = list(cast("tuple[Any, ...]", value)) if isinstance(value, (tuple, list)) else []
        if len(parts) not in (2, 3) or not isinstance(parts[0], str) or type(parts[-1]) not in (str, int):
            raise CheckpointError(
                f"keep_best is {value!r}: write (metric, direction) or (metric, direction, count): ('loss', 'min')"
            )
        return cls(*parts)

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise CheckpointError(f"keep_best: the direction is {self.mode!r}, it must be 'min' or 'max'")
        if type(self.count) is not int or self.count < 1:
            raise CheckpointError(f"keep_best: the count is {self.count!r}, it must be a number, 1 or more")

    def value(self, entry: "Kept") -> float | None:
        """The entry's metric, or None when it has none."""
        value = entry.metrics.get(self.metric)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def rank(self, entries: Sequence["Kept"]) -> list[Any]:
        """The entries that have the metric, best first; of equals the earlier step is better."""

        def order(entry: "Kept") -> tuple[float, int]:
            value = self.value(entry) or 0.0
            return (value if self.mode == "min" else -value, entry.sequence)

        return sorted((entry for entry in entries if self.value(entry) is not None), key=order)


class Kept(Protocol):
    """What the rules need to know of a checkpoint."""

    @property
    def step(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    @property
    def metrics(self) -> dict[str, Any]: ...
    @property
    def name(self) -> str | None: ...


def to_delete(entries: Sequence[Any], keep_last: int, keep_best: KeepBest | None) -> list[Any]:
    """The entries that may go: not of the newest ``keep_last`` steps, not among the best, not named by the user.

    Of two of one step (one saved after the step, one after its epoch ended) the newer stands for both.
    """
    newest = {entry.step: entry for entry in sorted(entries, key=lambda entry: entry.sequence)}
    last = sorted(newest.values(), key=lambda entry: entry.sequence)[-keep_last:]
    best = keep_best.rank(entries)[: keep_best.count] if keep_best else []
    kept = {entry.sequence for entry in [*last, *best]}
    return [entry for entry in entries if entry.sequence not in kept and entry.name is None]
