"""The cores of the machine, for the few threads that work beside the training thread."""

import contextlib
import ctypes
import os
import sys


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def current_core() -> int:
    """The core that the calling thread is on."""
    return ctypes.CDLL(None).sched_getcpu() if sys.platform == "linux" else 0


def leave_core(core: int) -> None:
    """Move the calling thread away from ``core``, for good; stays where it is when there is no other core.

    Linux often starts a thread on the core of the one that starts it, where the two take turns until the scheduler next
    balances its cores. That is milliseconds later, and a copy of 50 MB takes no longer.
    """
    if sys.platform == "linux":
        others = os.sched_getaffinity(0) - {core}
        with contextlib.suppress(OSError):  # the cores that it may use were just changed from outside
            if others:
                os.sched_setaffinity(0, others)
