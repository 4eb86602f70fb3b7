"""A data order that is a pure function of (seed, epoch), so that a position in it is one number."""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.data import Sampler


class ResumableSampler(Sampler[int]):
    """Shuffles ``size`` indices anew in every epoch and can start in the middle of one.

    With more than one rank it deals the permutation out in turn, so that the samples of one global step are the same
    for every world size whose ranks divide the global batch. Nothing about it needs saving: ``set_epoch`` places it.

    Args:
        size: number of samples.
        seed: seed of the permutations.
        rank, world_size: this process and the number of processes that share the data.
    """

    def __init__(self, size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.seed, self.rank, self.world_size = size, seed, rank, world_size
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Use the order of ``epoch``; skip the first ``start`` samples (counted over all ranks) the next time."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + self.epoch)
        order = cast("Any", torch.randperm(self.size, generator=generator, device="cpu"))
        start, self.start = self.start, 0
        indices: list[int] = order[start + self.rank :: self.world_size].tolist()
        return iter(indices)

    def __len__(self) -> int:
        return (self.size - self.rank + self.world_size - 1) // self.world_size
