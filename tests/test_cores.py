"""A thread that helps the training thread runs on another core, where the system can be asked for one."""

import os
import sys
import threading

import numpy as np
import pytest

from common import CheckpointManager, TrainState
from common.cores import available_cores, current_core, leave_core


class Weights:
    """Large enough to be copied and read by several threads, in tensors that are no multiple of what each takes."""

    def __init__(self) -> None:
        self.arrays = {f"{i}": np.random.default_rng(i).random(size) for i, size in enumerate((3, 700_001, 1_300_003))}

    def state_dict(self):
        return self.arrays

    def load_state_dict(self, state):
        self.arrays = state


@pytest.mark.skipif(sys.platform != "linux" or available_cores() < 2, reason="needs Linux and two cores")
def test_a_thread_leaves_the_core():
    mine, seen = current_core(), []
    allowed = os.sched_getaffinity(0)

    def work():
        leave_core(mine)
        seen.extend([current_core(), os.sched_getaffinity(0)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen[0] != mine and seen[1] == allowed - {mine}
    assert os.sched_getaffinity(0) == allowed, "the training thread stays free to move"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_the_only_core_is_not_left():
    seen = []

    def work():
        os.sched_setaffinity(0, {current_core()})
        leave_core(current_core())
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(seen[0]) == 1


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_what_several_threads_copied_is_what_was_saved(tmp_path, monkeypatch, platform):
    if platform == "darwin":  # a Mac has none of the calls
        monkeypatch.setattr(sys, "platform", "darwin")
        for name in ("sched_getaffinity", "sched_setaffinity"):
            monkeypatch.delattr(os, name)
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
    state = TrainState(model=Weights())
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.restore(state)
        for step in (1, 2):  # the buffer is used again
            state.step = step
            expected = {name: array.copy() for name, array in state.objects["model"].arrays.items()}
            checkpoints.save(state)
            for array in state.objects["model"].arrays.values():
                array += 1
    restored = TrainState(model=Weights())
    with CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.restore(restored)
    for name, array in restored.objects["model"].arrays.items():
        assert np.array_equal(array, expected[name]), name
