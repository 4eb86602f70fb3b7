"""Where the time of a save and of a restore goes, part by part; printed, for the explanations in RESULTS.md.

python benchmarks/parts.py --sizes 1,50,500
"""

import argparse
import copy
import mmap
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import Memcpy, medians, model_and_adam, quiet, state_dicts, take_turns, timed

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

    def part(owner, name, label):
        return timed(owner, name, spent.setdefault(label, []))

    manager, checkpoint, snapshot = common.CheckpointManager, common.checkpoint, common.snapshot
    undo = [
        part(Memcpy, "__call__", "memcpy"),
        part(manager, "save", "save"),
        part(common.TrainState, "state_dict", "  state_dict() of model, optimizer and random states"),
        part(checkpoint, "encode", "  the tree and the list of its tensors"),
        part(snapshot.Snapshot, "take", "  layout and copy"),
        part(snapshot, "_copy_in_memory", "    the copy of large tensors, on two threads"),
        part(manager, "restore", "restore"),
        part(checkpoint, "_read_state", "  read and verified"),
        part(checkpoint, "decode", "    tensors allocated"),
        part(snapshot.StateFile, "read", "    file read into them and hashed"),
        part(common.TrainState, "load_state_dict", "  load_state_dict() of model and optimizer"),
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
    return medians({label: seconds[2:] for label, seconds in spent.items()})


def first_write(advice, megabytes=50):
    """Seconds to write to memory for the first time, in pages as advised."""
    memory = mmap.mmap(-1, int(megabytes * 1e6), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    array = np.frombuffer(memory, np.uint8)
    began = time.perf_counter()
    array.fill(1)
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1,50,500", help="megabytes of model and Adam state")
    torch.set_num_threads(1)
    for size in map(float, parser.parse_args().sizes.split(",")):
        print(f"{size:g} MB")
        for label, milliseconds in parts_of(size).items():
            print(f"  {label:<52} {milliseconds:8.2f} ms")
    ways = {"4 KB": partial(first_write, mmap.MADV_NOHUGEPAGE), "2 MB": partial(first_write, mmap.MADV_HUGEPAGE)}
    for pages, milliseconds in medians(take_turns(ways, 9)).items():
        print(f"the first write to 50 MB of memory in pages of {pages}: {milliseconds:.1f} ms")
