"""Processes that die with the task that started them."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask Linux to kill this process as soon as its parent dies (``prctl(PR_SET_PDEATHSIG)``, see prctl(2)).

    Call it first thing in a child process, or pass it as ``preexec_fn`` to ``subprocess.Popen``. Without it a child
    of a SIGKILLed task trains on as an orphan and writes beside the retry. ``parent_pid`` closes the gap in which the
    parent may have died before the call. Does nothing on systems other than Linux.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)
