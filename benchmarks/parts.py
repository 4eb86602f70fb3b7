"""Where the time of a save and of a restore goes, part by part; printed, for the explanations in RESULTS.md.

python benchmarks/parts.py --sizes 1,50,500
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import Memcpy, model_and_adam, quiet, state_dicts

import common
import common.checkpoint
import common.snapshot

ROUNDS = 15


def parts_of(megabytes):
    """Milliseconds of each part, medians; parts are indented below what they are parts of."""
    model, optimizer = model_and_adam(megabytes)
    state = common.TrainState(model=model, optimizer=optimizer)
    memcpy = Memcpy(copy.deepcopy(state_dicts(model, optimizer)))
    spent = {}

    def timed(owner, name, label):
        method, times = getattr(owner, name), spent.setdefault(label, [])

        def wrapper(*arguments, **options):
            began = time.perf_counter()
            try:
                return method(*arguments, **options)
            finally:
                times.append(1000 * (time.perf_counter() - began))

        setattr(owner, name, wrapper)
        return lambda: setattr(owner, name, method)

    manager, checkpoint, snapshot = common.CheckpointManager, common.checkpoint, common.snapshot
    undo = [
        timed(Memcpy, "__call__", "memcpy"),
        timed(manager, "save", "save"),
        timed(common.TrainState, "state_dict", "  state_dict() of model, optimizer and random states"),
        timed(checkpoint, "encode", "  the tree and the list of its tensors"),
        timed(snapshot.Snapshot, "take", "  layout and copy"),
        timed(snapshot, "_copy_in_memory", "    the copy of large tensors, on two threads"),
        timed(manager, "restore", "restore"),
        timed(checkpoint, "_read_state", "  read and verified"),
        timed(checkpoint, "decode", "    tensors allocated"),
        timed(snapshot.StateFile, "read", "    file read into them and hashed"),
        timed(common.TrainState, "load_state_dict", "  load_state_dict() of model and optimizer"),
    ]
    with tempfile.TemporaryDirectory() as name, manager(Path(name) / "c", save_every="1h") as checkpoints, quiet():
        for _ in range(ROUNDS):
            memcpy()
            state.step += 1
            checkpoints.save(state)
            _ = checkpoints.latest
            checkpoints.restore(state)
    for one in undo:
        one()
    return {label: statistics.median(times[2:]) for label, times in spent.items()}


def fresh_memory(megabytes=50, rounds=9):
    """Milliseconds to write to memory for the first time, in pages of 4 KB and of 2 MB."""
    import mmap

    found = {}
    for label, advice in (("4 KB", mmap.MADV_NOHUGEPAGE), ("2 MB", mmap.MADV_HUGEPAGE)):
        times = []
        for _ in range(rounds):
            memory = mmap.mmap(-1, int(megabytes * 1e6), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(advice)
            array = np.frombuffer(memory, np.uint8)
            began = time.perf_counter()
            array.fill(1)
            times.append(1000 * (time.perf_counter() - began))
        found[label] = statistics.median(times)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1,50,500", help="megabytes of model and Adam state")
    torch.set_num_threads(1)
    for size in map(float, parser.parse_args().sizes.split(",")):
        print(f"{size:g} MB")
        for label, milliseconds in parts_of(size).items():
            print(f"  {label:<52} {milliseconds:8.2f} ms")
    for pages, milliseconds in fresh_memory().items():
        print(f"the first write to 50 MB of memory in pages of {pages}: {milliseconds:.1f} ms")
