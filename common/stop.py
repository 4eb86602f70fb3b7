"""Stopping in time: signals, the spot notice and the approach of Metaflow's ``@timeout`` become one question.

Asked at every step boundary, :meth:`StopWatch.reason` says whether to stop now. Nothing is interrupted: the step in
hand is finished and saved first.
"""

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
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._deadline: float | None = None
        self._last = time.monotonic()
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
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)

    def end(self, *, deliver: bool = False) -> None:
        """Put the former handlers back; with ``deliver`` they get a signal that no step boundary has answered."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if deliver and self._signal is not None:
            os.kill(os.getpid(), signal.Signals[self._signal])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
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
        self._intervals.append(now - self._last)
        self._last = now
        if self._signal is not None:
            return f"{self._signal} was received"
        if self._deadline is not None:
            needed = max(self._intervals) + max(self._saves, default=0.0) * 2 + _MARGIN
            if now + needed >= self._deadline:
                return f"@timeout is {max(0.0, self._deadline - now):.1f} s away"
        if now - self._notice_checked >= _NOTICE_INTERVAL:
            self._notice_checked = now
            notice = spot_notice()
            if notice is not None and os.access(notice, os.F_OK):  # Path.exists() may raise
                return "the machine is about to be taken away (spot termination notice)"
        return None


def spot_notice() -> str | None:
    """The file that Metaflow's spot monitor writes when the two-minute notice arrives, or None."""
    current: Any = getattr(sys.modules.get("metaflow"), "current", None)  # another thread may be importing it
    path = current.get("spot_termination_notice") if current is not None else None
    return str(path) if path else None
