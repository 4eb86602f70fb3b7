"""FAULTS: read strictly, noted before they fire, and fired once."""

import json

import pytest

from common.errors import CheckpointError, FaultInjected
from common.events import EventLog, parse
from common.faults import Faults
from common.faults import parse as parse_faults


def log(attempt=0, earlier=None):
    return EventLog(attempt, earlier or {}, lambda text: None)


@pytest.mark.parametrize("text", ["kill", "kill@step", "kill@step=0", "stop@step=3", "kill@step=3,attempts=1",
                                  "raise@save=2", "kill@step=3;oops", "kill@step=-1", "KILL@step=3",
                                  "kill@save=3,rank=1", "kill@step=3,rank=x"])  # fmt: skip
def test_an_unknown_fault_is_an_error_not_silence(text):
    with pytest.raises(CheckpointError, match="is not a fault"):
        parse_faults(text)


def test_several_faults_are_read():
    faults = parse_faults(" kill@step=7,attempt=0 ; alarm@step=9;kill@save=2 ;")
    assert [(f.action, f.trigger, f.number, f.attempt) for f in faults] == [
        ("kill", "step", 7, 0), ("alarm", "step", 9, None), ("kill", "save", 2, None)]  # fmt: skip


def test_it_fires_at_its_step_once_and_is_noted_first():
    events = log()
    faults = Faults(events, "raise@step=3")
    faults.at_step(2)
    with pytest.raises(FaultInjected):
        faults.at_step(3)
    assert [(e["event"], e["fault"], e["step"]) for e in events.events] == [("fault", "raise@step=3", 3)]
    faults.at_step(3)


def test_it_does_not_fire_again_in_the_next_attempt():
    first = log()
    with pytest.raises(FaultInjected):
        Faults(first, "raise@step=3").at_step(3)
    Faults(log(1, {0: first.events}), "raise@step=3").at_step(3)


def test_an_attempt_number_limits_it():
    Faults(log(0), "raise@step=3,attempt=1").at_step(3)
    with pytest.raises(FaultInjected):
        Faults(log(1), "raise@step=3,attempt=1").at_step(3)


@pytest.mark.parametrize("text", ["raise@step=3,rank=1,attempt=0", "raise@step=3,attempt=0,rank=1"])
def test_a_fault_of_another_rank_fires_there(text):
    events, struck = log(), []
    faults = Faults(events, text)
    faults.elsewhere = struck.append
    faults.at_step(3)
    assert [(fault.action, fault.rank, fault.attempt) for fault in struck] == [("raise", 1, 0)]
    assert [event["fault"] for event in events.events] == [text], "noted before it fires"


def test_a_fault_of_a_rank_that_is_not_there_is_an_error():
    with pytest.raises(CheckpointError, match="there is no rank 1"):
        Faults(log(), "raise@step=3,rank=1").at_step(3)


def test_what_a_kill_or_a_bad_disk_leaves_of_a_log_is_read():
    first, second = ({"event": name, "time": "2026-11-29T07:00:00"} for name in "ab")
    damage = ["null", "[]", '{"evenu": "x"}', json.dumps(first)[:9]]
    assert parse("\n".join([json.dumps(first), *damage[:3], json.dumps(second), damage[3]])) == [first, second]
