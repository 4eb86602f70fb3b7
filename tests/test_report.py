"""The card of a training: its numbers, its marks, and that it can do no harm."""

import base64
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import toy
from gallery import REPO, below

from common import CheckpointManager, report
from common.report import Cost, attempts, cost_table, time_left, training_chart, training_headline
from common.writer import Writer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def event(attempt: int, at: float, kind: str, /, **details: Any) -> dict[str, Any]:
    moment = datetime.fromtimestamp(1_000_000 + at, UTC).isoformat(timespec="milliseconds")
    return {"attempt": attempt, "event": kind, "time": moment, **details}


def saved(attempt: int, at: float, step: int, blocked: float) -> dict[str, Any]:
    return event(attempt, at, "saved", step=step, epoch=0, metrics={}, bytes=1000, seconds=0.5, blocked=blocked)


# a step takes 1 s, a save blocks for 0.25 s and is stored 0.5 s later; killed at 25, at 32, and done at 40
KILLED_TWICE = [
    event(0, 0.0, "started", pid=1, where=""),
    event(0, 3.0, "progress", step=1),
    saved(0, 12.75, 10, 0.25),  # its snapshot was complete at 12.25
    saved(0, 23.0, 20, 0.5),  # at 22.5
    event(0, 27.5, "fault", fault="kill@step=25", step=25),
    event(1, 30.0, "started", pid=2, where=""),
    event(1, 31.0, "resumed", step=20, epoch=0, source=""),
    event(1, 34.5, "progress", step=21),
    event(1, 39.5, "progress", step=26, blocked=0.0),
    saved(1, 44.25, 30, 0.25),  # at 43.75
    event(1, 45.75, "progress", step=32, blocked=0.25),
    event(2, 46.0, "started", pid=3, where=""),
    event(2, 47.0, "resumed", step=30, epoch=0, source=""),
    event(2, 48.75, "progress", step=31),
    saved(2, 58.5, 40, 0.25),
    event(2, 59.0, "ended", step=40, blocked=1.25),  # waited for a second until it was stored
]


def test_the_costs_are_what_was_injected():
    trials = attempts(KILLED_TWICE)
    assert [(t.start, t.reached, t.kept, t.ending) for t in trials] == [
        (0, 25, 20, "killed"), (20, 32, 30, "killed"), (30, 40, 40, "done"),
    ]  # fmt: skip
    cost = Cost.of(trials)
    assert cost.starting == pytest.approx(3.0)
    assert cost.restarting == pytest.approx((7.0, 3.0))
    assert cost.steps_repeated == 5 + 2
    assert cost.repeated == pytest.approx(5.0 + 2.0)
    assert cost.saving == pytest.approx(0.5 + 0.25 + 1.25)
    assert (cost.saves, cost.bytes) == (4, 4000)
    assert cost.progress == pytest.approx(19.0 + 9.0 + 9.0)
    assert cost.wall == pytest.approx(59.0)
    table = cost_table(cost)
    for words in ("7 s, 3 s", "7 steps", "4 checkpoints, 4 kB", f"{37 / 59:.1%}"):
        assert words in table


def test_a_damaged_checkpoint_makes_earlier_steps_count_no_more():
    """Attempt 1 went on from step 20; attempt 2 found that one damaged and went back to step 10."""
    events = [dict(event) for event in KILLED_TWICE[:14]]
    events[-2]["step"], events[-1]["step"] = 10, 11
    trials = attempts(events, now=1_000_000 + 49.75)
    assert [(t.reached, t.kept) for t in trials] == [(25, 10), (32, 20), (11, 11)]
    cost = Cost.of(trials)
    assert cost.steps_repeated == 15 + 12
    assert cost.repeated == pytest.approx((27.5 - 12.25 - 0.25) + (45.75 - 34.5 - 0.25))
    assert cost.wall == pytest.approx(49.75)
    assert trials[-1].ending == "running"


def test_times_of_a_running_training():
    trials = attempts(KILLED_TWICE[:4], now=1_000_000 + 24.0)
    assert time_left(trials, 39) == "21 s left"  # 19 steps in 21 s, and 19 are left
    assert training_headline(trials) == "Training for 24 s"
    trials = attempts(KILLED_TWICE[:6], now=1_000_000 + 40)  # no new step yet
    assert (time_left(trials, 39), Cost.of(trials).restarting) == ("", (pytest.approx(12.5),))
    assert training_headline(attempts(KILLED_TWICE)) == "Done in 59 s, interrupted twice"
    assert Cost.of([]).wall == 0


def test_an_empty_training_can_be_drawn():
    for events in ([], KILLED_TWICE[:1]):
        assert len(training_chart([], events)["vconcat"]) == 1


def test_metrics_of_one_kind_share_a_panel():
    history = [{"step": n, "learning_rate": 0.1, "loss": 1 / n, "grad, norm": 3.0, "note": None} for n in range(1, 5)]
    history.append({"step": 4, "epoch": 1, "eval_loss": 0.2, "eval_accuracy": 0.5})
    panels = training_chart(history, KILLED_TWICE)["vconcat"]
    titles = [panel["title"] for panel in panels]
    assert titles[0] == "loss (thin), eval_loss (thick)"
    assert len(panels) == 4  # at most three, and the attempts
    rows = rows_of(training_chart([{"step": 1, "validation_0_auc": 0.1, "validation_1_auc": 0.2}], KILLED_TWICE))
    assert [(row["metric"], row["value"]) for row in rows] == [("0", "0.1"), ("1", "0.2")]


def test_a_long_history_is_thinned():
    history = [{"step": n, "loss": 1.0 / n} for n in range(1, 20_001)]
    chart = training_chart(history, KILLED_TWICE, 20_000)
    assert len(rows_of(chart)) < 400 and rows_of(chart)[-1]["step"] == "20000"


def test_a_growing_history_is_read_once_and_rare_records_stay():
    thinned, history, seen = report._Thinned(), [], 0
    for n in range(1, 20_001):
        history.append({"step": n, "loss": 1.0 / n})
        if n % 5000 == 0:
            history.append({"step": n, "epoch": n // 5000, "val_loss": 1.0})
        if n % 777 == 0 or n == 20_000:
            thinned.add(history[seen:])
            found, seen = thinned.records(), len(history)
            assert found[-1]["step"] == n and found[0]["step"] == 1
    assert [record["step"] for record in found if "epoch" in record][:4] == [5000, 10_000, 15_000, 20_000]
    steps = [record["step"] for record in found if "loss" in record]
    assert 300 <= len(steps) <= 602 and max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 129


def rows_of(chart: dict[str, Any], panel: int = 0) -> list[dict[str, str]]:
    return list(csv.DictReader(chart["vconcat"][panel]["data"]["values"].splitlines()))


# ---------------------------------------------------------------- drawn by a training


class FakeCard:
    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.refreshed = 0

    def append(self, part: Any) -> None:
        self.parts.append(part)

    def refresh(self) -> None:
        self.refreshed += 1


def attempt(directory: Path, faults: str, card: Any = None) -> int:
    """One attempt of the toy training in a child process; its exit status."""
    pid = os.fork()
    if pid == 0:
        os.environ["FAULTS"] = faults
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        submit = Writer.submit
        Writer.submit = lambda writer, job: (submit(writer, job), writer.drain())  # stored before the kill
        toy.run(directory, save_every=3, card=card or FakeCard())
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("followed", [False, True], ids=["own process", "another process"])
def test_the_card_of_a_killed_training_has_every_mark(tmp_path: Path, followed: bool):
    straight = toy.run(tmp_path / "straight")
    assert attempt(tmp_path / "killed", "kill@step=5") and attempt(tmp_path / "killed", "kill@step=5;kill@step=8")
    card, told = FakeCard(), tmp_path / "told"
    with report.follow(card, told):
        assert toy.run(tmp_path / "killed", save_every=3, card=told if followed else card) == straight
    assert card.refreshed
    title, bar, picture, words = [part.render() for part in card.parts]
    assert "interrupted twice" in title["source"]
    assert (bar["value"], bar["max"], bar["details"]) == (12, 12, "done")
    assert "trained twice" in words["source"]

    chart = picture["spec"]
    curves, lanes = chart["vconcat"][:-1], chart["vconcat"][-1]
    assert [panel["title"].split(",")[0] for panel in curves] == ["loss", "mean"]
    lost = next(layer["data"]["values"] for layer in curves[0]["layer"] if layer["mark"]["type"] == "rule")
    assert [(mark["kept"], mark["step"]) for mark in lost] == [(4, 5), (6, 8)]
    bars = lanes["data"]["values"]
    assert [(bar["step"], bar["reached"], bar["died"]) for bar in bars] == [(0, 5, True), (4, 8, True), (6, 12, False)]
    assert [bar["text"].split(": ")[1] for bar in bars] == [
        "killed at 5", "resumed at 4, killed at 8", "resumed at 6, done",
    ]  # fmt: skip
    assert len({bar["color"] for bar in bars}) == 3
    dots = next(layer["data"]["values"] for layer in lanes["layer"] if layer["mark"]["type"] == "circle")
    events = [
        json.loads(line)
        for log in sorted((tmp_path / "killed" / "events").glob("*.jsonl"))
        for line in log.read_text().splitlines()
    ]
    assert len(dots) == len([event for event in events if event["event"] == "saved"])
    kept = {int(path.name[5:13]) for path in (tmp_path / "killed").glob("step-*")}
    assert {dot["step"] for dot in dots if dot["kept"]} == kept
    # each attempt's stretch of the curve, in its own shade; it begins where the one before ends
    means = rows_of(chart, 1)
    assert {row["attempt"]: [int(r["step"]) for r in means if r["attempt"] == row["attempt"]] for row in means} == {
        "0": [1, 2, 3, 4], "1": [4, 5, 6], "2": [6, 7, 8, 9, 10, 11, 12],
    }  # fmt: skip
    assert len({row["color"] for row in means}) == 3


def test_how_far_a_killed_attempt_got_is_noted_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "_NOTE_EVERY", 0.0)
    with CheckpointManager(tmp_path, save_every=100, card=FakeCard()) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        for _ in range(4):
            checkpoints.step(state)
            checkpoints._card._note()
        steps = [e["step"] for e in checkpoints._events.all() if e["event"] == "progress"]
        assert sorted(set(steps)) == [1, 2, 3, 4]
        assert all("blocked" in e for e in checkpoints._events.all() if e["event"] == "progress" and e["step"] > 1)


def test_a_training_in_another_process_is_drawn_while_it_goes_on(tmp_path: Path):
    from metaflow import cards  # noqa: F401  # else the first drawing imports it, and pauses in proportion

    card, told = FakeCard(), tmp_path / "told"
    with report.follow(card, told), CheckpointManager(tmp_path / "here", card=told) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG, total_steps=12)
        for reached in (2, 4):
            while state.step < reached:
                checkpoints.step(state, {"loss": 1.0 / (state.step + 1)})
            deadline = time.monotonic() + 300
            while not card.parts or card.parts[1].render()["value"] < reached:
                assert time.monotonic() < deadline, "the card does not show what the training has done"
                time.sleep(0.1)
            title, bar, picture, _ = [part.render() for part in card.parts]
            assert "Training for" in title["source"] and bar["max"] == 12
            assert [row["step"] for row in rows_of(picture["spec"])] == [str(n) for n in range(1, reached + 1)]


def test_the_death_of_another_process_is_drawn(tmp_path: Path):
    card, told = FakeCard(), tmp_path / "told"
    with pytest.raises(ChildProcessError), report.follow(card, told):
        assert attempt(tmp_path / "here", "kill@step=5", card=told)
        raise ChildProcessError("it was killed")
    assert "Attempt 0 ended at step" in card.parts[0].render()["source"]
    assert "killed" in card.parts[0].render()["source"]


def test_a_line_in_the_making_waits_and_no_line_is_no_card(tmp_path: Path):
    card, told = FakeCard(), tmp_path / "told"
    follower = report._Follower(card, told)
    follower._draw()
    line = json.dumps({"records": [{"step": 4, "loss": 0.5}], "events": KILLED_TWICE[:2], "newer": []}) + "\n"
    for part in (line[:40], line[40:-1]):
        with open(told, "a") as file:
            file.write(part)
        follower._draw()
        assert not card.parts
    with open(told, "a") as file:
        file.write(line[-1] + line[:40])
    follower._draw()
    title, picture, words = [part.render() for part in card.parts]  # no bar: how many steps it takes is not known
    assert [row["value"] for row in rows_of(picture["spec"])] == ["0.5"]


def test_a_file_that_cannot_be_written_does_not_stop_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert toy.run(tmp_path / "broken", card=tmp_path / "missing" / "told") == toy.run(tmp_path / "straight")
    assert capsys.readouterr().out.count("the card is not drawn any more: FileNotFoundError") == 1


@pytest.mark.parametrize("method", ["append", "refresh"])
def test_a_card_that_raises_does_not_stop_a_training(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]):
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no such card")

    card = FakeCard()
    setattr(card, method, broken)
    assert toy.run(tmp_path / "broken", card=card) == toy.run(tmp_path / "straight")
    assert capsys.readouterr().out.count("the card is not drawn any more: RuntimeError: no such card") == 1


def test_a_failed_attempts_last_word_is_on_its_card(tmp_path: Path):
    """Metaflow renders nothing when a task has failed, and refreshes a card every few seconds only."""
    card = FakeCard()
    card.parts_when_refreshed = []
    card.refresh = lambda: card.parts_when_refreshed.append(card.parts[0].render()["source"])
    with pytest.raises(ValueError), CheckpointManager(tmp_path, card=card) as checkpoints:
        checkpoints.restore(toy.new_state(), toy.CONFIG)
        raise ValueError("a bug")
    assert card._last_refresh == 0 and "ValueError" in card.parts_when_refreshed[-1]


def test_what_blocks_the_training_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = CheckpointManager._save_state
    monkeypatch.setattr(CheckpointManager, "_save_state", lambda *a, **k: (time.sleep(0.05), real(*a, **k)))
    with CheckpointManager(tmp_path, save_every=1) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        began = time.monotonic()
        for _ in range(4):  # an adapter's save calls the manager's
            state.step += 1
            checkpoints.boundary(state.step, lambda: checkpoints.save(state))
    last = checkpoints._events.events[-1]
    assert last["event"] == "ended" and last["step"] == 4
    assert 0.2 <= last["blocked"] <= time.monotonic() - began + 0.001, "counted twice it would be longer than it took"


# ---------------------------------------------------------------- drawn by Metaflow and a browser


@pytest.fixture(scope="module")
def real_card() -> Path:
    """The card of a flow that was killed twice, made by Metaflow."""
    root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
    line = [sys.executable, str(REPO / "tests" / "card_flow.py"), "run"]
    env = {**os.environ, "FAULTS": "kill@step=9;kill@step=25"}
    done = subprocess.run(line, cwd=tempfile.mkdtemp(dir=root), env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shown = re.search(r"the card of the whole training: --hash (\w+)", done.stdout)
    assert shown, done.stdout
    (path,) = below(root, f"CardToyFlow/**/cards/blank-training-{shown[1]}*.html")
    return path


def test_a_refresh_writes_what_metaflow_would_and_starts_no_process():
    """The contract with Metaflow's private parts; with one that has changed inside its own process does it."""
    cwd = tempfile.mkdtemp(dir=os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
    line = [sys.executable, str(REPO / "tests" / "card_refresh_flow.py"), "run"]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(Path(cwd, "found.json").read_text())
    assert found.pop("nice") == 10
    assert {name: entry["processes"] for name, entry in found.items()} == {
        "page": 1, "too early": 1, "in place": 1, "by Metaflow": 2, "changed inside": 3, "another part": 4,
    }  # fmt: skip
    assert not found["page"]["files"] and not found["too early"]["files"]
    here, theirs, changed, another = (found[name] for name in list(found)[2:])
    assert len(here["files"]) == 1 and here["files"] == theirs["files"] == another["files"]
    assert here["content"].pop("created_on") < theirs["content"].pop("created_on")
    assert here["content"] == theirs["content"]
    (part,) = changed["content"]["data"].values()
    assert part["source"].strip() == "c"
    assert len(another["content"]["data"]) == 2
    assert another["content"]["reload_token"] != here["content"]["reload_token"]


def test_metaflow_renders_the_card_when_the_task_is_done(real_card: Path):
    data = re.search(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', real_card.read_text())
    text = base64.b64decode(data[1]).decode()
    for words in ("interrupted twice", "killed at 9", "killed at 25", "done", "from death to the first new step"):
        assert words in text
    assert "Warning" not in text and "Error" not in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it(real_card: Path, tmp_path: Path, scheme: str):
    if BROWSER is None:
        pytest.skip("no Chromium is installed: whether the chart appears was not tested")
    line = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", f"--user-data-dir={tmp_path}", "--virtual-time-budget=8000", "--window-size=700,950",
            "--dump-dom", *(["--force-dark-mode"] if scheme == "dark" else []), real_card.as_uri()]  # fmt: skip
    page = subprocess.run(line, capture_output=True, text=True, timeout=900).stdout
    body = page[page.index("</aside>") :].partition("<script>")[0]
    assert re.search(r'<(canvas|svg)[^>]*class="marks"', body), body[:2000]
    assert body.count("<td") == 20 and "<progress" in body and "error" not in body.lower()
