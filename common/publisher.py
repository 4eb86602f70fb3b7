"""Publishing while a training runs, from a process of its own.

with common.Publisher(self.push_to, current.checkpoint) as publisher, common.CheckpointManager(...) as checkpoints:
    result = train(config, checkpoints)
    publisher.model(result.path)
"""

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from . import hub
from .commands import Checkpoint, Deleted, Place, find
from .errors import CheckpointError
from .metaflow_store import Task
from .model_card import About
from .process import die_with_parent
from .publish import Pushed, check_repo, new_scratch, push_checkpoint, push_model, set_up_client
from .redact import flat

STRATEGIES = ("end", "every_save", "checkpoint")


class Publisher:
    """Pushes to the Hub while a training runs, from a process of its own. Use it around the CheckpointManager.

    That process looks at the training's checkpoints from outside, as ``python -m common`` does, and pushes the newest
    one that the manager has committed. While it pushes, newer ones replace each other. The training never waits for it
    and gets no error of it: one line says that a push failed and one that it went through again. Like the task it dies
    with the machine, and the retry's goes on: what the Hub has already makes no commit.

    Args:
        repo: ``user/name``, or ``""``: nothing is pushed.
        place: what the manager got: ``current.checkpoint``, or a directory.
        strategy: as ``hub_strategy`` in TrainingArguments. ``"end"``: the model, after the training.
            ``"every_save"``: also each checkpoint's model, and with ``"checkpoint"`` also the whole newest checkpoint,
            in the folder ``last-checkpoint``.
        private: what a new repository becomes. A public one is refused.
        interval: seconds between two looks at the checkpoints.
        timeout: seconds that the Hub may take for a part of an answer before an attempt counts as failed.
        patience: seconds that the end of the ``with`` block waits for the last push, at most.
        about: see :class:`About`: base_model, dataset, license, language, tags.

    Raises:
        HubError: ``repo`` is no name of a repository.
        CheckpointError: the strategy is unknown, or there is no place.
    """

    def __init__(
        self,
        repo: str,
        place: Any = None,
        *,
        strategy: str = "every_save",
        private: bool = True,
        interval: float = 30,
        timeout: float = 60,
        patience: float = 60,
        **about: Any,
    ) -> None:
        if strategy not in STRATEGIES:
            raise CheckpointError(f"strategy is {strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if repo:
            check_repo(repo)
        self._repo, self._place, self._patience = repo, place, patience
        self._order: dict[str, Any] = {"repo": repo, "strategy": strategy, "private": private, "interval": interval,
                                       "timeout": timeout, "about": asdict(About(**about))}  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._model = ""
        self._failure = ""
        self._complete = False
        self._finished = threading.Event()

    def __enter__(self) -> "Publisher":
        if self._repo:
            if self._place is None:
                raise CheckpointError("Publisher needs the place of the checkpoints: give current.checkpoint")
            is_path = isinstance(self._place, (str, os.PathLike))
            self._target = str(self._place) if is_path else Task.from_environment().pathspec
            self._order["target"] = str(Path(self._target).absolute()) if is_path else self._target
            if self._order["strategy"] != "end":
                self._start()
        return self

    def model(self, path: str | os.PathLike[str]) -> None:
        """The trained model, which is pushed at the end of the ``with`` block."""
        self._model = str(Path(path).absolute())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not self._repo:
            return
        try:
            if kind is None:
                self._finish()
        except Exception as failure:  # of pipes and processes: not the training's business
            print(f"[publish] {type(failure).__name__}: {failure}", flush=True)
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    @property
    def command(self) -> str:
        """The command that pushes what was not pushed."""
        about: dict[str, Any] = {name: value for name, value in self._order["about"].items() if value}
        public, whole = not self._order["private"], self._order["strategy"] == "checkpoint"
        if not Path(__file__).with_name("__main__.py").exists():  # a copied project has no command line
            call = f"push_target({self._target!r}, {self._repo!r}, About(**{about!r}), private={not public}, "
            code = f"from {__package__}.publish import *; print({call}checkpoint={whole}))"
            return shlex.join(["python", "-c", code])
        options: list[str] = []
        for name, value in about.items():
            option = "--tag" if name == "tags" else f"--{name.replace('_', '-')}"
            options += [word for item in flat(value) for word in (option, item)]
        options += ["--public"] * public + ["--with-checkpoint"] * whole
        return shlex.join(["python", "-m", __package__ or "common", "push", self._target, self._repo, *options])

    def _finish(self) -> None:
        if self._process is None:
            self._start()
        self._tell({"final": self._model})
        answered = self._finished.wait(self._patience)
        if not self._complete:
            why = self._failure if answered else f"no end after {self._patience:g} s"
            what = "The model" if self._model else "The newest checkpoint"
            print(f"[publish] {what} is not on {self._repo} ({why}). Push it later: {self.command}", flush=True)

    def _start(self) -> None:
        here = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(dict.fromkeys([*(entry or str(Path.cwd()) for entry in sys.path), here]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.publisher", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is the training's
        )  # fmt: skip
        self._tell(self._order)
        threading.Thread(target=self._listen, name="publisher", daemon=True).start()

    def _tell(self, line: Mapping[str, Any]) -> None:
        process = cast("subprocess.Popen[str]", self._process)
        with contextlib.suppress(BrokenPipeError):  # it ended; _listen says so
            cast("Any", process.stdin).write(json.dumps(line) + "\n")
            cast("Any", process.stdin).flush()

    def _listen(self) -> None:
        process = cast("subprocess.Popen[str]", self._process)
        try:
            for line in cast("Any", process.stdout):
                self._hear(json.loads(line))
        finally:
            self._failure = self._failure or "its process ended early"
            self._finished.set()

    def _hear(self, news: dict[str, Any]) -> None:
        if "failed" in news:
            if not self._failure and not news["final"]:
                problem = f"{news['what']} could not be pushed: {news['failed']}"
                print(f"[publish] {problem} The training goes on.", flush=True)
            self._failure = news["failed"]
        else:
            again = " again" if self._failure else ""
            self._failure = ""
            did = f"is on {self._repo}{again}" if news["new"] or again else f"was on {self._repo} already"
            print(f"[publish] {news['what']} {did} (commit {news['commit'][:8]})", flush=True)
        if news["final"]:
            self._complete = "failed" not in news
            self._finished.set()


def _background(orders: "queue.SimpleQueue[dict[str, Any] | None]", report: Callable[[dict[str, Any]], None]) -> None:
    """The process of a Publisher: push what is new, until told to push what is final."""
    order = cast("dict[str, Any]", orders.get())
    repo, about, interval = order["repo"], About(**order["about"]), order["interval"]
    options: tuple[Any, ...] = (order["private"], order["strategy"] == "checkpoint", "")
    wait: float | None = None if order["strategy"] == "end" else 0.0
    ready = False
    key, done, failures = "", cast("Pushed | None", None), 0  # the checkpoint that was pushed last
    while True:
        told: dict[str, Any] | None = {}
        with contextlib.suppress(queue.Empty):
            told = orders.get(timeout=wait)
        if told is None:
            return
        what, wait = "the model" if told.get("final") else "a checkpoint", interval
        try:
            if not ready:
                set_up_client(repo, timeout=order["timeout"])
                ready = True
            newest = None if told.get("final") else _newest(order["target"])
            with new_scratch() as scratch:
                if told.get("final"):
                    done = push_model(Path(told["final"]), order["target"], repo, about, scratch, *options)
                elif newest is None:
                    if told:
                        raise CheckpointError(f"there is no checkpoint of {order['target']}")
                    continue
                elif newest[1].entry.key != key:
                    what = newest[1].label
                    done = push_checkpoint(*newest, repo, about, scratch, *options)
                    key = newest[1].entry.key
                elif not told:
                    continue
            pushed = cast("Pushed", done)
            report({"what": pushed.what, "new": bool(pushed.files), "commit": pushed.commit, "final": bool(told)})
        except Exception as error:
            if isinstance(error, Deleted) and not told:
                wait = 0.0  # newer ones have replaced it while it was read: no failure, the newest is next
                continue
            known = isinstance(error, (hub.HubError, CheckpointError))
            text = str(error) if known else "".join(traceback.format_exception_only(error)).strip()
            report({"failed": text.rstrip(".") + ".", "what": what, "final": bool(told)})
            failures = failures + 1
            wait = min(interval * 2**failures, max(interval, 600.0))
        else:
            failures = 0
        if told:
            return


def _newest(target: str) -> tuple[Place, Checkpoint] | None:
    try:
        place, found = find(target)
    except CheckpointError:
        return None  # there is none yet
    whole = [item for item in found if item.manifest and not item.fault]
    return (place, whole[-1]) if whole else None


def main() -> None:
    """``python -m common.publisher PARENT``: started by a Publisher. Orders and news are lines of JSON."""
    die_with_parent(int(sys.argv[1]))
    os.nice(10)  # the training keeps the cores
    news = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def report(line: dict[str, Any]) -> None:
        news.write(json.dumps(line) + "\n")
        news.flush()

    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    _background(orders, report)


if __name__ == "__main__":
    main()
