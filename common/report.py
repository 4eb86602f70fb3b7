"""Report cards, from Metaflow's own card components: single pictures, and the card of a whole training.

The latter is drawn from two things only, the metric history and the event log of all attempts.
"""

import contextlib
import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

from . import metaflow_card
from .events import Event, EventLog


def confusion_matrix(counts: Sequence[Sequence[int]], labels: Sequence[str]) -> Any:
    """A heat map of ``counts[true][predicted]`` with the numbers in it, as a card component.

    The diagonal is drawn on another scale than the errors, so that a single error can be seen.
    """
    from metaflow import cards

    rows = [
        {"true": labels[i], "predicted": labels[j], "count": int(count), "right": i == j}
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if count
    ]
    axis = {"type": "ordinal", "scale": {"domain": list(labels)}}
    position = {
        "x": {"field": "predicted", **axis, "axis": {"labelAngle": 0, "orient": "top"}},
        "y": {"field": "true", **axis},
    }
    return cast("Any", cards).VegaChart(
        {
            "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
            "title": {"text": "Confusion matrix: rows are the truth", "color": "#888"},
            "width": 360,
            "height": 360,
            "background": "transparent",
            "config": {
                "view": {"stroke": None},
                "axis": {"labelColor": "#888", "titleColor": "#888", "domain": False, "ticks": False},
            },
            "data": {"values": rows},
            "layer": [
                {
                    "mark": {"type": "rect", "cornerRadius": 3},
                    "encoding": {
                        **position,
                        "color": {"condition": {"test": "datum.right", "value": "#2a7f62"}, "value": "#d1495b"},
                        "opacity": {"condition": {"test": "datum.right", "value": 0.85}, "value": 0.7},
                    },
                },
                {
                    "mark": {"type": "text", "color": "white", "fontWeight": "bold"},
                    "encoding": {**position, "text": {"field": "count"}},
                },
            ],
        }
    )


def curves(history: Sequence[Mapping[str, Any]], names: Mapping[str, str], title: str, mark: int | None = None) -> Any:
    """Lines over the steps of a history, as a card component.

    Args:
        history: records with ``step`` and metrics; one without the metric is left out.
        names: ``{"val_logloss": "validation"}``: the metrics to draw and what to call them.
        title: what the y axis shows.
        mark: a step to mark with a vertical line, such as the best one.
    """
    rows = [
        {"step": record["step"], "value": record[name], "line": label}
        for record in history
        for name, label in names.items()
        if name in record
    ]
    layers: list[dict[str, Any]] = [
        {
            "mark": {"type": "line", "strokeWidth": 2},
            "encoding": {
                "x": {"field": "step", "type": "quantitative", "title": "step"},
                "y": {"field": "value", "type": "quantitative", "title": title},
                "color": {"field": "line", "type": "nominal", "title": None, "scale": {"range": _COLORS}},
            },
        }
    ]
    if mark is not None:
        rule = {"type": "rule", "color": _GREY, "strokeDash": [4, 4]}
        layers.append({"mark": rule, "encoding": {"x": {"datum": mark, "type": "quantitative", "title": "step"}}})
    return _chart({"title": {"text": title, "color": _GREY}, "data": {"values": rows}, "layer": layers})


def bars(values: Mapping[str, float], title: str, count: int = 15) -> Any:
    """The ``count`` largest of some named values as horizontal bars, as a card component."""
    largest = sorted(values.items(), key=lambda item: -item[1])[:count]
    return _chart(
        {
            "title": {"text": title, "color": _GREY},
            "data": {"values": [{"name": name, "value": float(value)} for name, value in largest]},
            "mark": {"type": "bar", "color": _COLORS[0], "cornerRadiusEnd": 3},
            "encoding": {
                "y": {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 220}},
                "x": {"field": "value", "type": "quantitative", "title": None},
            },
        }
    )


_GREY = "#888"  # readable on white and on black
_COLORS = ["#2a7f62", "#d1495b", "#3d6fb6", "#c08a1e"]


def _chart(spec: Mapping[str, Any]) -> Any:
    from metaflow import cards

    axis = {"labelColor": _GREY, "titleColor": _GREY, "domainColor": _GREY, "tickColor": _GREY, "gridOpacity": 0.15}
    return cast("Any", cards).VegaChart(
        {
            "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
            "width": 480,
            "height": 280,
            "background": "transparent",
            "config": {"view": {"stroke": None}, "axis": axis, "legend": {"labelColor": _GREY}},
            **spec,
        }
    )


# ---------------------------------------------------------------- what a training went through


@dataclass(frozen=True)
class Attempt:
    """What the event log tells about one attempt. Times are seconds since 1970."""

    number: int
    start: int  # the step it resumed at, or 0
    reached: int  # the last step it is known to have done
    kept: int  # its steps up to this one count; a later attempt did the others again
    began: float
    first: float | None  # when its first step was done
    kept_at: float  # when step `kept` was
    end: float  # its last sign of life
    ending: str  # "running", "done", "stopped", "killed", "rank lost", or the name of an error
    blocked: float  # seconds that the training thread waited for saving
    kept_blocked: float  # of these, until ``kept_at``
    saves: int
    bytes: int


def attempts(events: Sequence[Event], now: float | None = None) -> list[Attempt]:
    """The attempts of a training, in order.

    Args:
        events: of all attempts, each with its ``attempt`` (``EventLog.all()``).
        now: the time, when the last attempt may still be running.
    """
    logs: dict[int, list[Event]] = {}
    for event in events:
        logs.setdefault(event["attempt"], []).append(event)
    found: list[Attempt] = []
    resumed: int | None = None  # the lowest step that a later attempt started from
    for number in sorted(logs, reverse=True):
        found.insert(0, _attempt(number, logs[number], resumed, None if found else now))
        resumed = found[0].start if resumed is None else min(resumed, found[0].start)
    return found


_ENDINGS = {"StopRequested": "stopped", "KeyboardInterrupt": "stopped", "RankLost": "rank lost"}


def _attempt(number: int, log: list[Event], resumed: int | None, now: float | None) -> Attempt:
    starts = [event["step"] for event in log if event["event"] == "resumed"]
    start = starts[-1] if starts else 0
    steps = [event["step"] for event in log if event["event"] in ("progress", "saved", "fault", "ended")]
    reached = max([start, *(step for step in steps if step is not None)])
    kept = reached if resumed is None else max(start, min(reached, resumed))
    ended = next((event for event in log if event["event"] == "ended"), None)
    error = "done" if ended is None else str(ended.get("error", "done"))
    ending = ("killed" if now is None else "running") if ended is None else _ENDINGS.get(error, error)
    end = max(_time(event) for event in log) if now is None or ended else now
    first = next((_time(event) for event in log if event["event"] == "progress"), None)
    blocked = max(event.get("blocked", 0.0) for event in log)
    saves = [event for event in log if event["event"] == "saved"]
    kept_at, kept_blocked = end, blocked
    if first is not None and kept < reached:
        share = (kept - start) / (reached - start)  # unless the log knows better
        kept_at, kept_blocked = first + share * (end - first), share * blocked
        for event in saves:
            if event["step"] == kept:  # its snapshot was taken before it was written
                kept_at = min(end, max(first, _time(event) - event["seconds"]))
                kept_blocked = event.get("blocked", kept_blocked)
    return Attempt(number, start, reached, kept, _time(log[0]), first, kept_at, end, ending, blocked, kept_blocked,
                   len(saves), sum(event["bytes"] for event in saves))  # fmt: skip


def _time(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


@dataclass(frozen=True)
class Cost:
    """Where the wall time of a training went, in seconds; the parts add up to ``wall``.

    Attributes:
        starting: until the first step of all was done.
        progress: training steps that count.
        saving: the training thread waited for checkpoints.
        repeated: training steps that a later attempt did again.
        restarting: from each death to the first new step.
        steps_repeated: steps that were trained twice.
        saves: checkpoints written.
        bytes: of these.
    """

    starting: float
    progress: float
    saving: float
    repeated: float
    restarting: tuple[float, ...]
    steps_repeated: int
    saves: int
    bytes: int

    @classmethod
    def of(cls, trials: Sequence[Attempt]) -> "Cost":
        """What :func:`attempts` returned, added up."""
        spans = [(trial, trial.first) for trial in trials if trial.first is not None]
        gaps = [first - before.end for (before, _), (_, first) in pairwise(spans)]
        if spans and trials[-1] is not spans[-1][0]:
            gaps.append(trials[-1].end - spans[-1][0].end)  # and still no new step
        lost = 0.0
        saving = progress = 0.0
        for trial, first in spans:
            saving += trial.blocked
            progress += trial.kept_at - first - trial.kept_blocked
            lost += trial.end - trial.kept_at - (trial.blocked - trial.kept_blocked)
        return cls(
            starting=(spans[0][1] if spans else trials[-1].end) - trials[0].began if trials else 0.0,
            progress=progress,
            saving=saving,
            repeated=lost,
            restarting=tuple(max(0.0, gap) for gap in gaps),
            steps_repeated=sum(trial.reached - trial.kept for trial in trials),
            saves=sum(trial.saves for trial in trials),
            bytes=sum(trial.bytes for trial in trials),
        )

    @property
    def wall(self) -> float:
        return self.starting + self.progress + self.saving + self.repeated + sum(self.restarting)


# ---------------------------------------------------------------- the card of a training

_SHADES = ["#2a9d8f", "#4c86d8", "#9a6fd0", "#d0679d", "#d9823b", "#8a9a3b"]  # of the attempts
_DIED = "#e5484d"
_BY_COLOR = {"field": "color", "type": "nominal", "scale": None, "legend": None}
_POINTS = 300  # of a line; more cannot be seen
_WIDTH = 580
_NOTE_EVERY = 5.0  # seconds, at least, between two notes of how far the training got

# Metaflow's card is white only; these are its own variables and a few of its rules
_STYLE = """<style>
.mf-card .container:has(>.inner>progress){background:none;padding:0 0 1rem}
.mf-card .container>.inner{max-width:none}
.mf-card .inner .details{font:inherit;color:inherit}
.mf-card .inner progress{height:10px;border-radius:5px;overflow:hidden}
.mf-card progress::-webkit-progress-bar{background:var(--lt-grey)!important}
.mf-card progress::-webkit-progress-value{background:#2a9d8f}
.mf-card progress::-moz-progress-bar{background:#2a9d8f!important}
.mf-card .cost{margin:.75rem 0}
.mf-card .cost td{text-align:left;padding:.4rem .8rem}
.mf-card .parts{display:flex;height:14px;border-radius:7px;overflow:hidden}
@media (prefers-color-scheme:dark){:root{--bg:#15181d;--black:#d8dbe0;--dk-grey:#9aa0a8;--white:#15181d;
--lt-grey:#2b3038;--lt-lt-grey:#1d2127;--grey:rgba(255,255,255,.15)}}
</style>"""


def training_chart(
    history: Sequence[Mapping[str, Any]],
    events: Sequence[Event],
    total_steps: int | None = None,
    now: float | None = None,
) -> dict[str, Any]:
    """Curves and attempts over the same steps, as a Vega-Lite specification.

    Args:
        history: records with ``step`` and metrics.
        events: as for :func:`attempts`.
        total_steps: where the axis ends, if known.
        now: as for :func:`attempts`.
    """
    trials = attempts(events, now)
    end = max([1, total_steps or 0, *(trial.reached for trial in trials), *(record["step"] for record in history[-1:])])
    x = {"field": "step", "type": "quantitative", "scale": {"domain": [0, end]}}
    panels = [_curve_panel(history, names, trials, x) for names in _families(history)]
    panels.append(_attempt_panel(trials, events, x, end))
    axis = {"labelColor": _GREY, "titleColor": _GREY, "domainColor": _GREY, "tickColor": _GREY, "gridColor": _GREY,
            "gridOpacity": 0.18, "titleFontWeight": "normal", "labelFontSize": 11}  # fmt: skip
    title = {"color": _GREY, "fontSize": 12, "anchor": "start", "frame": "group"}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "transparent",
        "width": _WIDTH,  # of each panel; without it Metaflow adds one that Vega-Lite does not know here
        "spacing": 14,
        "config": {"view": {"stroke": None}, "axis": axis, "title": title},
        "vconcat": [{"width": _WIDTH, **panel} for panel in panels],
    }


def _families(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of metrics, those of one kind together, the one on the validation data last; at most three kinds."""
    names: dict[str, None] = {}
    for record in [*history[:50], *history[-50:], *islice((record for record in history if "epoch" in record), 50)]:
        names.update((name, None) for name, value in record.items() if _is_number(value))
    families: dict[str, list[str]] = {}
    for name in names:
        if name not in ("step", "epoch"):
            families.setdefault(re.sub(r"^(train|val|valid|validation_\d+|eval|test)_", "", name), []).append(name)
    validated = {kind for kind, names in families.items() if any(name != kind for name in names)}
    kinds = sorted(families, key=lambda kind: ("loss" not in kind, kind not in validated, len(families[kind]) == 1))
    return [
        sorted(families[kind], key=lambda name: name != kind and not name.startswith("train")) for kind in kinds[:3]
    ]


def _layer(kind: str, encoding: Mapping[str, Any], only: str = "", data: Any = None, **mark: Any) -> dict[str, Any]:
    layer: dict[str, Any] = {"mark": {"type": kind, **mark}, "encoding": encoding}
    if only:
        layer["transform"] = [{"filter": only}]
    if data is not None:
        layer["data"] = {"values": data}
    return layer


def _curve_panel(
    history: Sequence[Mapping[str, Any]], names: list[str], trials: Sequence[Attempt], x: dict[str, Any]
) -> dict[str, Any]:
    lines = ["metric,attempt,color,step,value"]  # a table in one string costs a tenth of one in dicts
    values: list[float] = []
    for place, name in enumerate(names):
        points = _thin([(record["step"], record[name]) for record in history if _is_number(record.get(name))])
        values += [value for _, value in points]
        before: tuple[int, str] | None = None  # whose the point before was, and where
        for step, value in points:
            owner, point = _owner(trials, step), f"{step},{value:.6g}"
            if before is not None and owner != before[0]:  # the line of an attempt begins where the one before ends
                lines.append(f"{place},{owner},{_shade(owner)},{before[1]}")
            lines.append(f"{place},{owner},{_shade(owner)},{point}")
            before = owner, point
    low, high = min(values), max(values)
    scale: dict[str, Any] = {"zero": False}
    axis: dict[str, Any] = {"title": None, "minExtent": 40, "maxExtent": 40, "format": "~g", "tickCount": 4}
    if 0 < low * 30 < high:
        scale = {"type": "log", "nice": False}
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        axis["values"] = [digit * 10.0**power for power in powers for digit in ((1, 3) if len(powers) < 4 else (1,))]
    curve = {
        "x": {**x, "axis": {"title": None, "labels": False, "ticks": False, "domain": False}},
        "y": {"field": "value", "type": "quantitative", "scale": scale, "axis": axis},
        "color": _BY_COLOR,
    }
    line = {**curve, "detail": {"field": "attempt"}}
    point = {**curve, "tooltip": [{"field": "step"}, {"field": "value"}, {"field": "attempt"}]}
    lost = [{"step": trial.reached, "kept": trial.kept, "color": _shade(trial.number)} for trial in trials[:-1]]
    last = f"datum.metric == {len(names) - 1}"
    few = sum(line.startswith(f"{len(names) - 1},") for line in lines) <= 60
    title = names[-1] if len(names) == 1 else f"{', '.join(names[:-1])} (thin), {names[-1]} (thick)"
    return {
        "title": title + (", logarithmic" if "type" in scale else ""),
        "height": 170 if "loss" in names[-1] else 100,
        "data": {"values": "\n".join(lines), "format": {"type": "csv"}},
        "layer": [
            _layer("rect", {"x": {**x, "field": "kept"}, "x2": {"field": "step"}, "color": _BY_COLOR}, "", lost,
                   opacity=0.25),
            _layer("rule", {"x": x}, "", lost, color=_DIED, strokeDash=[4, 3]),
            _layer("line", line, f"!({last})", strokeWidth=1, opacity=0.6),
            _layer("line", line, last, strokeWidth=2.4, strokeCap="round", interpolate="monotone"),
            _layer("circle", point, last, size=28, opacity=float(few)),  # invisible ones have a tooltip, too
        ],
    }  # fmt: skip


def _attempt_panel(trials: Sequence[Attempt], events: Sequence[Event], x: Any, end: int) -> dict[str, Any]:
    bars: list[dict[str, Any]] = []
    for trial in trials:
        text = f"attempt {trial.number}: " + (f"resumed at {trial.start}, " if trial.start else "")
        text += trial.ending if trial.ending in ("running", "done") else f"{trial.ending} at {trial.reached}"
        bars.append({"row": trial.number, "color": _shade(trial.number), "step": trial.start, "reached": trial.reached,
                     "text": text, "right": trial.start > end / 2, "end": end,
                     "died": trial.ending not in ("running", "done")})  # fmt: skip
    alive = Counter[int]()  # by step: of two checkpoints of one step, one may be gone
    for event in events:
        alive[event.get("step", -1)] += {"saved": 1, "deleted": -1}.get(event["event"], 0)
    dots = [
        {"row": event["attempt"], "color": _shade(event["attempt"]), "step": event["step"],
         "kept": alive[event["step"]] > 0, "size": _bytes(event["bytes"]), "written in": _seconds(event["seconds"])}
        for event in events if event["event"] == "saved"
    ]  # fmt: skip
    dropped = [dot for dot in dots if not dot["kept"]]
    dots = _thin(dropped) + [dot for dot in dots if dot["kept"]]
    row = {"field": "row", "type": "ordinal", "axis": None, "scale": {"domain": [trial.number for trial in trials]}}
    bar = {"x": {**x, "axis": {"title": "step", "grid": False}}, "y": row, "color": _BY_COLOR}
    dot = {**bar, "tooltip": [{"field": name} for name in ("step", "kept", "size", "written in")]}
    mark = {"y": row, "text": {"field": "text"}}
    caption = {"dy": -11, "fontSize": 11, "color": _GREY}
    twice = "; shaded steps were trained twice" if len(trials) > 1 else ""
    return {
        "title": f"attempts and their checkpoints: filled are kept, hollow dropped{twice}",
        "height": {"step": 36},
        "data": {"values": bars},
        "layer": [
            _layer("bar", {**bar, "x2": {"field": "reached"}}, height=6, cornerRadius=3, opacity=0.45),
            _layer("point", dot, "!datum.kept", dots, size=20, strokeWidth=1.2, opacity=1),
            _layer("circle", dot, "datum.kept", dots, size=70, opacity=1),
            _layer("text", {"x": {**x, "field": "reached"}, "y": row}, "datum.died", text="✕", fontSize=15,
                   fontWeight="bold", color=_DIED),
            _layer("text", {**mark, "x": x}, "!datum.right", align="left", **caption),
            _layer("text", {**mark, "x": {**x, "field": "end"}}, "datum.right", align="right", **caption),
        ],
    }  # fmt: skip


def _thin(items: list[Any]) -> list[Any]:
    every = -(-len(items) // _POINTS)
    return items if every <= 1 else [*items[:-1:every], items[-1]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _owner(trials: Sequence[Attempt], step: int) -> int:
    """The attempt whose step counts: the last that started before it; -1 for another run's."""
    return next((trial.number for trial in reversed(trials) if trial.start < step), -1)


def _shade(number: int) -> str:
    return _SHADES[number % len(_SHADES)] if number >= 0 else _GREY


def training_headline(trials: Sequence[Attempt]) -> str:
    """One line that says how the training is doing."""
    if not trials:
        return "Starting"
    last, deaths = trials[-1], len(trials) - 1
    times = {0: "", 1: ", interrupted once", 2: ", interrupted twice"}.get(deaths, f", interrupted {deaths} times")
    spent = _seconds(last.end - trials[0].began)
    if last.ending == "done":
        return f"Done in {spent}{times}"
    if last.ending == "running":
        return f"Training for {spent}{times}"
    return f"Attempt {last.number} ended at step {last.reached}: {last.ending}"


def cost_table(cost: Cost) -> str:
    """A bar that shows where the time went, and the same in words, as Markdown for a card."""
    wall = cost.wall or 1.0
    gaps = ", ".join(map(_seconds, cost.restarting))
    rows = [
        ("#2a9d8f", "progress", cost.progress, "steps that count"),
        ("#d9a23b", "blocked by saving", cost.saving, f"{cost.saves} checkpoints, {_bytes(cost.bytes)} written"),
        (_DIED, "trained twice", cost.repeated, f"{cost.steps_repeated} steps"),
        ("#8b8f98", "from death to the first new step", sum(cost.restarting), gaps or "no restart"),
        ("#bcc0c7", "until the first step", cost.starting, "after the imports"),
    ]
    bar = "".join(f'<i style="width:{seconds / wall:.2%};background:{color}"></i>' for color, _, seconds, _ in rows)
    lines = "".join(
        f'<tr><td><b style="color:{color}">■</b> {name}</td><td>{_seconds(seconds)}</td><td>{seconds / wall:.1%}</td>'
        f"<td>{note}</td></tr>"
        for color, name, seconds, note in rows
    )
    return f'### Where the time went\n\n<div class="parts">{bar}</div><table class="cost">{lines}</table>'


def time_left(trials: Sequence[Attempt], total_steps: int) -> str:
    """What the last attempt's pace says; empty before its second step."""
    last = trials[-1] if trials else None
    if last is None or last.ending != "running":
        return "" if last is None else last.ending
    done = last.reached - last.start - 1  # since the end of its first step
    if last.first is None or done < 1:
        return ""
    return f"{_seconds((total_steps - last.reached) * (last.end - last.first) / done)} left"


def _seconds(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds >= 0.01 or not seconds else f"{seconds * 1000:.2g} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class _Thinned:
    """A history, thinned while it grows. What a refresh costs does not depend on how long the training is."""

    def __init__(self) -> None:
        self._newest: list[Mapping[str, Any]] = []
        self._kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}  # by their names, so that rare ones stay
        self._every: Counter[tuple[str, ...]] = Counter()
        self._skip: Counter[tuple[str, ...]] = Counter()

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The next ones of the history."""
        for record in records:
            kind = tuple(record)
            if self._skip[kind]:
                self._skip[kind] -= 1
                continue
            kept = self._kinds.setdefault(kind, [])
            kept.append(record)
            if len(kept) > 2 * _POINTS:
                del kept[1::2]
                self._every[kind] = 2 * self._every[kind] + 1
            self._skip[kind] = self._every[kind]
        self._newest = [*records[-1:]] or self._newest

    def records(self) -> list[Mapping[str, Any]]:
        """Some hundred records of each kind, and the newest of all."""
        found = [record for kept in self._kinds.values() for record in kept if record not in self._newest]
        return sorted([*found, *self._newest], key=lambda record: record["step"])


class _Page:
    """A Metaflow card with a training on it."""

    def __init__(self, card: Any) -> None:
        self._card: Any = card
        metaflow_card.refresh_in_place(card)
        self._thinned = _Thinned()
        self._parts: tuple[Any, Any, Any, Any] | None = None
        self._attempt = 0

    def show(
        self, records: Sequence[Mapping[str, Any]], events: Sequence[Event], newer: Sequence[Event], now: float | None
    ) -> None:
        """Draw. ``records`` are new in the history, ``newer`` is newer than the log; ``now`` as for attempts()."""
        self._thinned.add(records)
        self._attempt = events[-1]["attempt"]
        self._update(self._card, self._thinned.records(), [*events, *newer], now)
        self._card.refresh()

    def close(self, done: bool) -> None:
        if not done:
            if self._parts is not None:
                metaflow_card.refresh_now(self._card)  # Metaflow renders nothing when a task has failed
            return
        metaflow_card.end_renderers()
        if self._parts is None:
            metaflow_card.leave_out(self._card)
        elif self._attempt and (name := metaflow_card.hash_of(self._card)):
            # each attempt has a card with the same id; this one shows them all
            print(f"[checkpoints] the card of the whole training: --hash {name}", flush=True)

    def _update(
        self, card: Any, history: Sequence[Mapping[str, Any]], events: Sequence[Event], now: float | None
    ) -> None:
        trials = attempts(events, now)
        total = next((event["total_steps"] for event in reversed(events) if event.get("total_steps")), None)
        heading = f"{_STYLE}\n\n## {training_headline(trials)}"
        chart = training_chart(history, events, total, now)
        table = cost_table(Cost.of(trials))
        reached, left = trials[-1].reached, time_left(trials, total or 0)
        if self._parts is None:
            from metaflow import cards

            kinds = cast("Any", cards)
            bar = kinds.ProgressBar(max=total, label="step", value=reached) if total else None
            self._parts = kinds.Markdown(heading), bar, kinds.VegaChart(chart), kinds.Markdown(table)
            for part in filter(None, self._parts):
                card.append(part)
        title, bar, picture, words = self._parts
        title.update(heading)
        picture.update(chart)
        words.update(table)
        if bar is not None:
            bar.update(reached, metadata=left)


class _File:
    """In place of a card: what there is to draw, for another process. Each line has what is new since the last one."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path, self._told = path, 0

    def show(
        self, records: Sequence[Mapping[str, Any]], events: Sequence[Event], newer: Sequence[Event], now: float | None
    ) -> None:
        line = {"records": records, "events": events[self._told :], "newer": newer}
        self._told = len(events)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self, done: bool) -> None:
        pass


class _Drawer:
    """Draws on a thread of its own. What fails is said once and given up."""

    def __init__(self, target: _Page | _File) -> None:
        self._target: _Page | _File | None = target
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to draw."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="training-card", daemon=True)
            self._thread.start()

    def close(self, *, done: bool) -> None:
        """Draw for the last time. When the task is ``done`` Metaflow renders the card once more by itself."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(10)
        self._draw()
        if self._target is not None:
            try:
                self._target.close(done)
            except Exception as error:
                self._give_up(error)

    def _run(self) -> None:
        began = time.monotonic()
        pause = 0.0
        while not self._stop.wait(pause):
            used = time.thread_time()
            self._note()
            self._draw()
            pause = max(1.0, 200 * (time.thread_time() - used), min(60.0, (time.monotonic() - began) / 100))

    def _note(self) -> None:
        pass

    def _draw(self) -> None:
        if self._target is None:
            return
        try:
            records, events, newer = self._look()
            if events:
                self._target.show(records, events, newer, None if self._stop.is_set() else time.time())
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(f"[checkpoints] the card is not drawn any more: {type(error).__name__}: {error}", flush=True)
        self._target = None

    def _look(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Event], Sequence[Event]]:
        """What is new in the history, all that is in the log, and what is newer than it."""
        raise NotImplementedError


class TrainingCard(_Drawer):
    """Draws a training on a Metaflow card while it runs, on a thread of its own.

    About once a second at first, then each time another hundredth of the training is over, at least once a minute. The
    thread spends at most half a percent of the time. Metaflow renders the page once, in a process of its own; what is
    new on it this thread writes. A card that fails is said once and given up.

    Args:
        card: ``current.card["training"]``; or the path of a file, to which is written what :func:`follow` draws.
        events: the log; how far the training got is noted in it.
        progress: the step reached, and what else an event of progress tells.

    Attributes:
        history: returns the records to draw.
    """

    def __init__(self, card: Any, events: EventLog, progress: Callable[[], dict[str, Any]]) -> None:
        super().__init__(_File(cast("Path", card)) if isinstance(card, (str, os.PathLike)) else _Page(card))
        self.history: Callable[[], Sequence[Mapping[str, Any]]] = list
        self._seen = 0
        self._events, self._progress = events, progress
        self._noted: tuple[float, Any] = time.monotonic(), None  # when, and which step

    def _note(self) -> None:
        # so that the log shows where an attempt was that nobody could ask any more
        progress, now = self._progress(), time.monotonic()
        if now - self._noted[0] >= _NOTE_EVERY and progress["step"] != self._noted[1]:
            self._noted = now, progress["step"]
            with contextlib.suppress(OSError):
                self._events.add("progress", **progress)

    def _look(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Event], Sequence[Event]]:
        events, progress, newer = self._events.all(), self._progress(), list[Event]()
        if progress["step"] is not None:
            moment = datetime.now(UTC).isoformat()
            newer.append({"event": "progress", "attempt": self._events.attempt, "time": moment, **progress})
        records = self.history()[self._seen :]
        self._seen += len(records)
        return records, events, newer


@contextlib.contextmanager
def follow(card: Any, path: str | os.PathLike[str]) -> Generator[None]:
    """While the block runs, draw the training of another process: the one with ``CheckpointManager(card=path)``.

    For a training that the task only starts and waits for. A file that never appears leaves no card.

    Args:
        card: ``current.card["training"]`` of the task.
        path: a file that both can reach; it does not exist yet.
    """
    drawer = _Follower(card, path)
    drawer.start()
    try:
        yield
    except BaseException:
        drawer.close(done=False)
        raise
    drawer.close(done=True)


class _Follower(_Drawer):
    """Draws what :class:`_File` has written."""

    def __init__(self, card: Any, path: str | os.PathLike[str]) -> None:
        super().__init__(_Page(card))
        self._path, self._place = path, 0
        self._events: list[Event] = []
        self._newer: list[Event] = []

    def _look(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Event], Sequence[Event]]:
        text = b""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._place)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # the last line may be in the making, or cut short by a kill
        self._place += len(text)
        records: list[Mapping[str, Any]] = []
        for line in map(json.loads, text.splitlines()):
            records += line["records"]
            self._events += line["events"]
            self._newer = line["newer"]
        return records, self._events, self._newer
