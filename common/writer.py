"""One background thread that writes checkpoints, one at a time."""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable


class Writer:
    """Runs one job at a time on a thread of low priority.

    ``submit`` waits until the job before is done, because both use the same snapshot buffer; an error of a job is
    raised by the next ``submit`` or ``drain``, on the thread that calls it.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` in the background, after the one before. Raises that one's error instead, if it failed."""
        self.drain()
        if self._thread is None:
            # daemon: after an error in user code a thread that is still writing must not delay Metaflow's retry
            self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
            self._thread.start()
        self._idle.clear()
        self._jobs.put(job)

    def drain(self) -> None:
        """Wait until nothing is being written; raise the error of the last job, once."""
        self._idle.wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def busy(self) -> bool:
        """Whether a job is running or waiting."""
        return not self._idle.is_set()

    def close(self) -> None:
        """Drain and end the thread."""
        try:
            self.drain()
        finally:
            if self._thread is not None:
                self._jobs.put(None)
                self._thread.join()
                self._thread = None

    def _run(self) -> None:
        if sys.platform == "linux":  # nice is per thread there: training keeps the cores
            thread = threading.get_native_id()
            with contextlib.suppress(OSError):  # it may not be allowed to, and needs not
                os.setpriority(os.PRIO_PROCESS, thread, max(10, os.getpriority(os.PRIO_PROCESS, thread)))
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                self._error = error
            finally:
                self._idle.set()
