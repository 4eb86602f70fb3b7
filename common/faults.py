"""Faults on demand, so that anybody can see a training survive: ``FAULTS="kill@step=7,attempt=0" python flow.py run``.

The variable holds one or more faults, separated by ``;``::

    kill@step=N     SIGKILL after step N, before that step is saved
    kill@save=N     SIGKILL in the middle of writing the N-th checkpoint of an attempt
    term@step=N     SIGTERM, as a cluster sends before it takes a machine away
    alarm@step=N    SIGALRM, as Metaflow's @timeout sends
    raise@step=N    an exception
    hang@step=N     never come back

``,attempt=K`` limits a fault to attempt K; ``,rank=R`` strikes rank R of a distributed training instead of rank 0.
Each fires once in a task, and is noted in the event log before it fires.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from .errors import CheckpointError, FaultInjected
from .events import EventLog

VARIABLE = "FAULTS"
ACTIONS = ("kill", "term", "raise", "alarm", "hang")
_GRAMMAR = re.compile(rf"({'|'.join(ACTIONS)})@(step|save)=([1-9][0-9]*)((?:,(?:attempt|rank)=[0-9]+)*)")


@dataclass(frozen=True)
class Fault:
    """One parsed fault: what happens, at which step or save, in which attempt (None: in any), to which rank."""

    text: str
    action: str
    trigger: str
    number: int
    attempt: int | None
    rank: int = 0


def parse(text: str) -> list[Fault]:
    """Parse the value of FAULTS. Raises CheckpointError for anything that is not a fault."""
    faults: list[Fault] = []
    for part in filter(None, (piece.strip() for piece in text.split(";"))):
        match = _GRAMMAR.fullmatch(part)
        options = {name: int(value) for name, value in re.findall(r"(\w+)=([0-9]+)", match[4])} if match else {}
        rank = options.get("rank", 0)
        if match is None or (match[2] == "save" and (match[1] != "kill" or rank)):  # rank 0 saves
            raise CheckpointError(
                f"{VARIABLE}: {part!r} is not a fault. A fault is kill, term, raise, alarm or hang with @step=N, "
                "or kill@save=N, and may end in ,attempt=K and, at a step, ,rank=R; several are separated by ';'"
            )
        faults.append(Fault(part, match[1], match[2], int(match[3]), options.get("attempt"), rank))
    return faults


class Faults:
    """The faults of this training that have not fired in an earlier attempt.

    Attributes:
        elsewhere: called with a fault of another rank than 0, to let it fire there; None: there are no other ranks.
    """

    def __init__(self, events: EventLog, text: str | None = None) -> None:
        self.elsewhere: Callable[[Fault], None] | None = None
        faults = parse(os.environ.get(VARIABLE, "") if text is None else text)
        fired = {event["fault"] for event in events.all() if event["event"] == "fault"}
        self._events = events
        self._pending = [
            fault
            for fault in faults
            if fault.text not in fired and (fault.attempt is None or fault.attempt == events.attempt)
        ]

    def at_step(self, step: int) -> None:
        """Let the faults of ``step`` fire."""
        self._fire("step", step, step)

    def in_save(self, number: int, step: int) -> None:
        """Let the faults fire that belong into the middle of the ``number``-th write of this attempt."""
        self._fire("save", number, step)

    def _fire(self, trigger: str, number: int, step: int) -> None:
        for fault in [fault for fault in self._pending if (fault.trigger, fault.number) == (trigger, number)]:
            self._pending.remove(fault)
            self._events.add("fault", fault=fault.text, step=step)
            print(f"[faults] {fault.text} at step {step}", flush=True)
            if fault.rank == 0:
                strike(fault.action)
            elif self.elsewhere is not None:
                self.elsewhere(fault)
            else:
                raise CheckpointError(f"{VARIABLE}: {fault.text}: there is no rank {fault.rank} in this training")


def strike(action: str) -> None:
    """Do to this process what a fault says."""
    if action == "raise":
        raise FaultInjected(f"{VARIABLE} asked for an exception")
    if action == "hang":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM, "alarm": signal.SIGALRM}[action])
