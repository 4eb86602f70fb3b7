"""What the benchmarks share: runs that take turns, medians, ratios, and the record of a row.

These machines are noisy, so nothing is compared with a figure of another time: all ways take turns in one process,
and what counts is the ratio of their medians.
"""

import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEGABYTE = 1e6


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        against: what it is compared with.
        ratio: median of ours by median of theirs, or an absolute figure where ``unit`` says so.
        goal: ``ratio`` should be at most this.
        values: medians behind it, for instance milliseconds of each way.
        unit: of ``ratio`` and ``goal``: ``"x"`` for a ratio.
        least: what ``ratio`` may as well have been, see :func:`least`; on a restless machine far below it. None:
            there is one measurement only.
    """

    what: str
    against: str
    ratio: float
    goal: float
    values: dict[str, float]
    unit: str = "x"
    least: float | None = None

    @property
    def met(self) -> bool:
        return self.ratio <= self.goal


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call each way once a round, in changing order. Seconds of each; one that returns a float timed itself."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    shuffled = random.Random(0)
    for number in range(-warm_up, rounds):
        for name, way in shuffled.sample(list(ways.items()), len(ways)):
            began = time.perf_counter()
            result = way()
            spent = result if isinstance(result, float) else time.perf_counter() - began
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def timed(owner: Any, name: str, into: list[float]) -> Callable[[], None]:
    """Append the seconds of every call of a method or function to a list. Returns what ends that."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            into.append(time.perf_counter() - began)

    setattr(owner, name, wrapper)
    return lambda: setattr(owner, name, method)


def medians(seconds: Mapping[str, list[float]], factor: float = 1000.0) -> dict[str, float]:
    """The median of each way; in milliseconds unless ``factor`` says otherwise."""
    return {name: statistics.median(values) * factor for name, values in seconds.items()}


def least(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The ratio of the lower quartile of ours to the upper quartile of theirs."""
    lower, upper = (statistics.quantiles(values, n=4, method="inclusive") for values in (ours, theirs))
    return lower[0] / upper[2]


def versus(what: str, seconds: Mapping[str, list[float]], ours: str, goals: Mapping[str, float]) -> list[Row]:
    """A row for each way that ``ours`` is compared with."""
    values = medians(seconds)
    return [
        Row(what, other, values[ours] / values[other], goal, values, least=least(seconds[ours], seconds[other]))
        for other, goal in goals.items()
    ]


def report(rows: list[Row], file: str | None) -> None:
    """Print rows, with the machine's load, and append them to a JSON file where one is named."""
    load = os.getloadavg()[0]
    for row in rows:
        values = ", ".join(f"{name} {value:.4g}" for name, value in row.values.items())
        mark = "met " if row.met else "MISS"
        print(f"{mark} {row.what} | {row.against}: {row.ratio:.3g}{row.unit} (goal {row.goal:.3g}) | {values}")
    print(f"load average {load:.2f}", flush=True)
    if file:
        path = Path(file)
        earlier: list[Any] = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps(earlier + [{**asdict(row), "load": load} for row in rows], indent=1))


def model_and_adam(megabytes: float) -> tuple[Any, Any]:
    """A model of transformer layers (an MLP below 10 MB) whose weights and Adam moments take that much."""
    import torch

    if megabytes < 10:
        width = round((megabytes * MEGABYTE / 12 / 8) ** 0.5)
        model: Any = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8)))
        batch = torch.randn(4, width)
    else:
        width = 8 * round((megabytes * MEGABYTE / 12 / 192) ** 0.5 / 8)
        layers = [torch.nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True) for _ in range(16)]
        model, batch = torch.nn.Sequential(*layers), torch.randn(1, 4, width)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(batch).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def state_dicts(model: Any, optimizer: Any) -> dict[str, Any]:
    """What people save."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def save_today(model: Any, optimizer: Any) -> Any:
    """What people do in a Metaflow task without common/: torch.save and current.checkpoint.save. The reference."""
    import torch
    from metaflow import current

    directory = Path(current.checkpoint.directory)
    torch.save(state_dicts(model, optimizer), directory / "state.pt")
    return current.checkpoint.save(str(directory), name="today")


def tensors(tree: Any) -> list[Any]:
    """The tensors in nested dicts and lists."""
    import torch

    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [tensor for item in items for tensor in tensors(item)]


class Memcpy:
    """A copy of tensors into one reused buffer on one thread: the floor for a snapshot."""

    def __init__(self, tree: Any) -> None:
        import numpy as np

        self._tensors = tensors(tree)  # whose memory must stay
        self._sources = [(tensor.data_ptr(), tensor.nbytes) for tensor in self._tensors]
        self.nbytes = sum(size for _, size in self._sources)
        self._buffer = np.ones(self.nbytes, np.uint8)  # touched

    def __call__(self) -> None:
        import ctypes

        address = self._buffer.ctypes.data
        for source, size in self._sources:
            ctypes.memmove(address, source, size)
            address += size


class quiet:
    """Keeps the start line of a manager out of a benchmark's output."""

    def __enter__(self) -> None:
        self._stdout, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115

    def __exit__(self, *error: object) -> None:
        sys.stdout.close()
        sys.stdout = self._stdout
