"""One small log per attempt, kept beside the checkpoints: what was found, rejected, resumed, saved, and how it ended.

The log is for people and for the report card. No clock time of it ever enters a training's state or result.
"""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from .errors import CheckpointError, WriteFailed

Event = dict[str, Any]


class EventLog:
    """Appends events to the log of one attempt; ``earlier`` holds the logs of the attempts before, by number."""

    def __init__(self, attempt: int, earlier: dict[int, list[Event]], append: Callable[[str], None]) -> None:
        self.attempt = attempt
        self.earlier = earlier
        self.events: list[Event] = list(earlier.pop(attempt, []))
        self._append = append
        self._lock = threading.Lock()

    def add(self, event: str, **details: Any) -> None:
        """Record an event; it is stored when this returns."""
        record: Event = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), **details}
        with self._lock:  # the training, the writer and the card have threads of their own
            self.events.append(record)
            try:
                self._append(json.dumps(record) + "\n")
            except OSError as error:
                if isinstance(error, CheckpointError):
                    raise
                raise WriteFailed(
                    f"the log beside the checkpoints could not be written: {error.strerror or error}. Free some space, "
                    "then start again."
                ) from error

    def all(self) -> list[Event]:
        """The events of all attempts, in order, each with its attempt number."""
        logs = {**self.earlier, self.attempt: self.events}
        return [{"attempt": attempt, **event} for attempt in sorted(logs) for event in logs[attempt]]


def parse(text: str) -> list[Event]:
    """The events of a log. What is none is left out: a last line that a kill cut short, a damaged one."""
    events: list[Event] = []
    for line in text.splitlines():
        try:
            event: Any = json.loads(line)
            if isinstance(event["event"], str) and isinstance(event["time"], str):
                events.append(event)
        except (ValueError, TypeError, KeyError):
            continue
    return events
