"""A training in several processes (PyTorch's ranks): one of them saves, all are restored, stopped and watched together.

Rank 0 leads: it has the one :class:`CheckpointManager` and tells the others over the process group what it is about to
do. So no rank needs the store but rank 0, all continue the very same checkpoint, and nothing can mix.
"""

import ctypes
import faulthandler
import json
import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from .checkpoint import CheckpointManager
from .encoding import TORCH_OF, decode, encode
from .errors import CheckpointError, StopRequested
from .faults import ACTIONS, Fault, strike
from .manifest import Manifest
from .state import TrainState, seed_everything
from .stop import StopWatch
from .store import Entry

_dist: Any = torch.distributed  # its type hints are incomplete
_READY, _GATHER, _LOAD, _FAULT, _STOP = range(5)  # what rank 0 tells the others


class RankLost(CheckpointError):
    """Another rank died or hangs, so this one cannot go on."""


def rank() -> int:
    """This process's number among all of the training; 0 without a process group."""
    return int(_dist.get_rank()) if _dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return int(_dist.get_world_size()) if _dist.is_initialized() else 1


class DistributedTrainState(TrainState):
    """A :class:`TrainState` of all ranks: it holds the random states of each, and restoring it restores them all.

    ``state_dict`` and ``load_state_dict`` are collective. Rank 0 calls them, through its manager, and the others, who
    wait in ``step``, ``epoch_end`` or ``restore`` of :class:`DistributedCheckpointManager`, take part.

    Restored by another number of ranks than it was saved by, the position, the data order and the global batch are the
    same; each rank then gets a random state of its own that is derived from the saved ones.
    """

    def state_dict(self) -> dict[str, Any]:
        _tell(_GATHER)
        tree = super().state_dict()
        return {**tree, "rng": {"ranks": _gather(tree["rng"])}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _tell(_LOAD)
        tree = _from_rank_0(state)
        ranks = tree["rng"]["ranks"]
        same = len(ranks) == world_size()
        super().load_state_dict({**tree, "rng": ranks[rank() if same else 0]})
        if not same:
            seed_everything((random.getrandbits(31) + rank()) % 2**32)


class DistributedCheckpointManager:
    """The :class:`CheckpointManager` of a distributed training: every rank has one and makes the same calls.

    Rank 0 saves, with the random states of all ranks in the checkpoint. What it restores goes to the other ranks over
    the process group. A rank that is asked to stop (SIGTERM, Ctrl-C) takes the others with it: the step in hand is
    finished and saved. A rank that makes no step for ``timeout`` seconds is ended, and shows where it hung.

    Args:
        place: as for :class:`CheckpointManager`; only rank 0's is used.
        timeout: seconds; longer than the longest time between two steps, with evaluation and one save.
        options: of :class:`CheckpointManager`.

    Raises:
        RankLost: from the ``with`` block, when another rank died or hangs.
        CheckpointError: as :class:`CheckpointManager` does.
    """

    def __init__(self, place: Any = "checkpoints", *, timeout: float = 300.0, **options: Any) -> None:
        self._timeout = timeout
        self._leader = _Leader(place, **options) if rank() == 0 else None
        self._stop = StopWatch()
        self._step = 0

    def __enter__(self) -> "DistributedCheckpointManager":
        if self._leader is not None:
            self._leader.__enter__()
        else:
            self._stop.start()
        self._alive()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        lost: RankLost | None = None
        if isinstance(error, _dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            what = str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0]
            lost = RankLost(
                f"rank {rank()} of {world_size()} lost the others after step {self._step} ({what}): one of them died, "
                f"was killed (out of memory?) or made no step for {self._timeout:g} s. All ranks must start again"
            )
        if self._leader is not None:
            self._leader.__exit__(kind, lost or error, trace)  # its log has the reason
        else:
            self._stop.end(deliver=error is None)
        if lost is not None:
            raise lost from error

    def restore(self, state: DistributedTrainState, config: Any = None, *, total_steps: int | None = None) -> bool:
        """Put rank 0's newest valid checkpoint into the state of every rank. See :meth:`CheckpointManager.restore`."""
        self._alive()
        if self._leader is None:
            found = self._follow(state)
        else:
            with self._leading():
                found = self._leader.restore(state, config, total_steps=total_steps)
            if (entry := self._leader.restored) is not None:
                metrics = "".join(f", {name} {value:.4g}" for name, value in entry.metrics.items())
                place = f"{entry.where}: step {entry.step}, epoch {entry.epoch or 0}{metrics}"
                print(f"[gang] each of {world_size()} ranks continues {place}", flush=True)
        self._step = state.step
        return found

    def step(self, state: DistributedTrainState, metrics: Mapping[str, Any] | None = None) -> None:
        """Count an optimizer step. ``metrics`` must be the same on all ranks. See :meth:`CheckpointManager.step`."""
        self._alive()
        self._pass_on_stop()
        if self._leader is None:
            state.step += 1
            state.step_in_epoch += 1
            if metrics:
                state.log(metrics)
            self._follow(state)
        else:
            with self._leading():
                self._leader.step(state, metrics)
        self._step = state.step

    def epoch_end(self, state: DistributedTrainState, metrics: Mapping[str, Any] | None = None) -> None:
        """Count an epoch. ``metrics`` must be the same on all ranks. See :meth:`CheckpointManager.epoch_end`."""
        self._alive()
        if self._leader is None:
            state.epoch += 1
            state.step_in_epoch = 0
            state.log(metrics or {}, epoch=state.epoch)
            self._follow(state)
        else:
            with self._leading():
                self._leader.epoch_end(state, metrics)

    # what only rank 0 has

    @property
    def directory(self) -> Path:
        """See :class:`CheckpointManager`."""
        return self._only().directory

    @property
    def latest(self) -> Any:
        """See :attr:`CheckpointManager.latest`."""
        return self._only().latest

    @property
    def resumed_from(self) -> list[int]:
        """See :attr:`CheckpointManager.resumed_from`."""
        return self._only().resumed_from

    def load_best(self) -> dict[str, Any]:
        """See :meth:`CheckpointManager.load_best`."""
        return self._only().load_best()

    def _only(self) -> CheckpointManager:
        if self._leader is None:
            raise CheckpointError(f"rank 0 alone has the checkpoints; this is rank {rank()}")
        return self._leader

    # ---------------------------------------------------------------- together

    def _alive(self) -> None:
        # a thread of the interpreter's own, which needs no GIL: also a hang in C code ends, and shows where it was
        faulthandler.dump_traceback_later(self._timeout, exit=True)

    def _pass_on_stop(self) -> None:
        asks = self._leader is None and self._stop.reason() is not None
        asked = torch.tensor([asks], dtype=torch.int32, device="cpu")
        if world_size() > 1:
            _dist.all_reduce(asked)
        if self._leader is not None and asked.item():
            self._leader.stop_because("another rank was asked to stop")

    @contextmanager
    def _leading(self) -> Generator[None]:
        """Rank 0 acts; the others follow until it is done."""
        try:
            yield
        except CheckpointError:
            with suppress(RuntimeError):  # they may be gone, too
                _tell(_STOP)
            raise
        _tell(_READY)

    def _follow(self, state: DistributedTrainState) -> bool:
        """The other ranks: take part in what rank 0 does. Returns whether it was restored."""
        loaded = False
        while True:
            order, first, second = _hear()
            if order == _GATHER:
                state.state_dict()
            elif order == _LOAD:
                state.load_state_dict({})
                loaded = True
            elif order == _FAULT and first == rank():
                strike(ACTIONS[second])
            elif order == _STOP:
                raise StopRequested(f"rank {rank()} stopped after step {state.step}, because rank 0 did; see there")
            elif order == _READY:
                return loaded


class _Leader(CheckpointManager):
    """Rank 0's manager. It knows that it is not alone."""

    restored: Entry | None = None  # the checkpoint that this attempt continues

    def __init__(self, place: Any, **options: Any) -> None:
        super().__init__(place, **options)
        self._stop = self._shared = _SharedStop()
        self._faults.elsewhere = self._fault_elsewhere

    def _fault_elsewhere(self, fault: Fault) -> None:
        if fault.rank >= world_size():
            raise CheckpointError(f"FAULTS: {fault.text}: the ranks are 0 to {world_size() - 1}")
        _tell(_FAULT, fault.rank, ACTIONS.index(fault.action))

    def _choose(self, config: Any, total_steps: int | None, read: Any) -> Any:
        chosen = super()._choose(config, total_steps, read)
        self._environment["ranks"] = world_size()
        self.restored = chosen[0] if chosen else None
        return chosen

    def _check_fingerprint(self, manifest: Manifest, entry: Entry) -> None:
        self._environment["ranks"] = world_size()  # another number adds in another order
        super()._check_fingerprint(manifest, entry)

    def stop_because(self, reason: str) -> None:
        """Save and stop at the end of this step."""
        self._shared.elsewhere = reason


class _SharedStop(StopWatch):
    elsewhere: str | None = None  # why another rank has to stop

    def reason(self) -> str | None:
        return super().reason() or self.elsewhere


# -------------------------------------------------------------------- the wire


def _tell(order: int, first: int = 0, second: int = 0) -> None:
    """Rank 0 tells the others what comes; a call of another rank does nothing."""
    if rank() == 0 and world_size() > 1:
        _dist.broadcast(torch.tensor([order, first, second], device="cpu"), src=0)


def _hear() -> list[int]:
    heard = torch.zeros(3, dtype=torch.int64, device="cpu")
    _dist.broadcast(heard, src=0)
    return [int(number) for number in heard]


def _gather(tree: Any) -> list[Any]:
    """The trees of all ranks on rank 0, in order; elsewhere an empty list."""
    if world_size() == 1:
        return [tree]
    mine = _pack(tree)
    sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(world_size())]
    _dist.all_gather(sizes, torch.tensor([len(mine)], device="cpu"))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([mine, torch.zeros(longest - len(mine), dtype=torch.uint8, device="cpu")])
    if rank() != 0:
        _dist.gather(padded, dst=0)
        return []
    blobs = [torch.empty(longest, dtype=torch.uint8, device="cpu") for _ in sizes]
    _dist.gather(padded, blobs, dst=0)
    return [_unpack(blob) for blob in blobs]


def _from_rank_0(tree: Any) -> Any:
    """Rank 0's tree, on every rank."""
    if world_size() == 1:
        return tree
    blob = _pack(tree) if rank() == 0 else None
    size = torch.tensor([0 if blob is None else len(blob)], device="cpu")
    _dist.broadcast(size, src=0)
    if blob is None:
        blob = torch.empty(int(size), dtype=torch.uint8, device="cpu")
    _dist.broadcast(blob, src=0)
    return tree if rank() == 0 else _unpack(blob)


def _pack(tree: Any) -> torch.Tensor:
    """A tree in one tensor of bytes: a length, JSON, the arrays."""
    body, arrays = encode(tree)
    layout = {name: [array.dtype, array.shape, array.nbytes] for name, array in arrays.items()}
    head = json.dumps([body, layout], allow_nan=False).encode()
    blob = torch.empty(8 + len(head) + sum(array.nbytes for array in arrays.values()), dtype=torch.uint8, device="cpu")
    address = blob.data_ptr()
    ctypes.memmove(address, len(head).to_bytes(8, "little") + head, 8 + len(head))
    address += 8 + len(head)
    for array in arrays.values():
        array.copy_to(address)
        address += array.nbytes
    return blob


def _unpack(blob: torch.Tensor) -> Any:
    start = 8 + int.from_bytes(ctypes.string_at(blob.data_ptr(), 8), "little")
    body, layout = json.loads(ctypes.string_at(blob.data_ptr() + 8, start - 8))
    tensors: dict[str, torch.Tensor] = {}
    for name, (dtype, shape, nbytes) in layout.items():
        tensors[name] = torch.empty(shape, dtype=getattr(torch, TORCH_OF[dtype]), device="cpu")
        ctypes.memmove(tensors[name].data_ptr(), blob.data_ptr() + start, nbytes)
        start += nbytes
    return decode(body, tensors.__getitem__, lambda name: tensors[name].numpy())
