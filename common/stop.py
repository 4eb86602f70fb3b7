"""Stopping in time: signals, the spot notice and the approach of Metaflow's ``@timeout`` become one question.

Asked at every step boundary, :meth:`StopWatch.reason` says whether to stop now. Nothing is interrupted: the step in
hand is finished and saved first.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections import deque
from types import FrameType
from typing import Any

_NOTICE_INTERVAL = 1.0  # seconds between two looks for the spot notice
_MARGIN = 0.5  # seconds left for Metaflow to record the failed attempt


class StopWatch:
    """Watches for reasons to stop, between ``start()`` and ``end()``."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._deadline: float | None = None
        self._last = time.monotonic()
        self._first: float | None = None  # from the start to the first boundary
        self._intervals: deque[float] = deque(maxlen=100)
        self._saves: deque[float] = deque(maxlen=20)
        self._notice_checked = 0.0

    def start(self) -> None:
        """Install handlers for SIGTERM and SIGINT, and read how much time ``@timeout`` leaves."""
        self._last = time.monotonic()
        # @timeout is one SIGALRM set before the step began; its handler stays, this only reads the time left
        remaining = signal.getitimer(signal.ITIMER_REAL)[0]
        self._deadline = time.monotonic() + remaining if remaining else None
        if threading.current_thread() is threading.main_thread():
            _let_children_end()
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal) or signal.SIG_DFL  # None: not Python's
            _watching.append(self)

    def end(self, *, deliver: bool = False) -> None:
        """Put the former handlers back; with ``deliver`` they get a signal that no step boundary has answered."""
        if self in _watching:  # first: a thread may fork meanwhile
            _watching.remove(self)
        for number in self._previous:
            self.restore(number)
        self._previous.clear()
        if deliver and self._signal is not None:
            os.kill(os.getpid(), signal.Signals[self._signal])

    def restore(self, number: int) -> None:
        """Put back the handler that was there before."""
        signal.signal(number, self._previous[number])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._pid:
            return  # Ctrl-C goes to all processes; the training still needs its workers, and ends them when it stops
        if self._signal is not None:  # asked twice: do not wait for the step to end
            previous = self._previous.get(number)
            self.end()
            if callable(previous):
                previous(number, frame)
            else:
                os.kill(os.getpid(), number)
            return
        self._signal = name

    def saved(self, seconds: float) -> None:
        """Tell how long a save took until it was durable."""
        self._saves.append(seconds)

    def reason(self) -> str | None:
        """Why to stop at this step boundary, or None. Also measures the time between boundaries."""
        now = time.monotonic()
        since, self._last = now - self._last, now
        if self._first is None:
            self._first = since  # loading data and compiling, too: no later step takes as long
        else:
            self._intervals.append(since)
        if self._signal is not None:
            return f"{self._signal} was received"
        if self._deadline is not None:
            needed = max(self._intervals, default=0.0) + max(self._saves, default=0.0) * 2 + _MARGIN
            if now + needed >= self._deadline:
                return f"@timeout is {max(0.0, self._deadline - now):.1f} s away"
        if now - self._notice_checked >= _NOTICE_INTERVAL:
            self._notice_checked = now
            notice = spot_notice()
            if notice is not None and os.access(notice, os.F_OK):  # Path.exists() may raise
                return "the machine is about to be taken away (spot termination notice)"
        return None

    @property
    def may_be_last(self) -> bool:
        """Whether this is the first boundary, and ``@timeout`` so close that the next one may never come."""
        if self._deadline is None or self._first is None or self._intervals:
            return False
        return time.monotonic() + self._first + _MARGIN >= self._deadline


_watching: list[StopWatch] = []  # those whose handlers are installed, the outermost first


@functools.cache
def _let_children_end() -> None:
    # Every `with Pool()` ends its workers by SIGTERM. A handler of the training would only note it there; and Python
    # runs one of its own between two bytecodes, which a worker that waits for a lock never reaches.
    before = threading.local()

    def block() -> None:  # a fork also forgets the signals that the child has been sent before it runs
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def restore_and_unblock() -> None:
        if _watching:
            _watching[0].restore(signal.SIGTERM)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=restore_and_unblock)


def spot_notice() -> str | None:
    """The file that Metaflow's spot monitor writes when the two-minute notice arrives, or None."""
    current: Any = getattr(sys.modules.get("metaflow"), "current", None)  # another thread may be importing it
    path = current.get("spot_termination_notice") if current is not None else None
    return str(path) if path else None
