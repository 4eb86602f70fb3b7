"""Trainings inside of somebody else's program: started as a child process, watched from outside.

For programs that are a Trainer of Hugging Face transformers at heart, such as ``llamafactory-cli``, and know nothing of
this package. What they leave behind is enough: a log with one JSON record per line, and for each save a directory
``checkpoint-N``, in which ``trainer_state.json`` is written last.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointManager
from .errors import CheckpointError
from .process import die_with_parent
from .state import without_clock

_STATE = "trainer_state.json"
_POLL = 0.05  # seconds between two looks at the log
_GRACE = 2.0  # seconds to end after SIGTERM: torchrun ends its workers then
_LINES = 30  # of the program's output, shown when it fails
_LOGGED = {"loss": "loss", "learning_rate": "lr", "eval_loss": "eval_loss"}  # metrics, and what the log calls them
_MARK = "FOREIGN_TRAINER_DIRECTORY"  # in the environment of the program and of all that it starts

# what TrainingArguments may say, and why nothing else
_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "save_strategy": (("steps",), "checkpoints come at the multiples of save_steps"),
    "logging_strategy": (("steps",), "the log tells how far the training is"),
    "eval_strategy": (("no", "steps"), "the evaluation at the end of an epoch comes after that step's checkpoint, and "
                                       "would be left out when resuming there. Use steps and eval_steps"),
    "save_only_model": ((False,), "optimizer, schedule and random state would be lost"),
    "save_total_limit": ((None,), "a checkpoint could go while it is being stored; keep_last decides what stays"),
    "load_best_model_at_end": ((False,), "the best checkpoint's path is dead after a restart; use keep_best"),
    "ignore_data_skip": ((False,), "an interrupted epoch would start again with its first batches"),
    "enable_jit_checkpoint": ((False,), "it saves in the middle of a step, when dropout has already drawn its numbers"),
    "eval_on_start": ((False,), "every restart would evaluate again"),
    "auto_find_batch_size": ((False,), "it starts anew with smaller batches. Find the size first, then set it"),
    "streaming": ((False,), "nobody can tell whether the data come in the same order after a restart"),
    "push_to_hub": ((False,), "every attempt would push. Push the result of the flow"),
    "trust_remote_code": ((False,), "it runs code that comes with the model"),
}  # fmt: skip
_DEFAULTS = {"save_strategy": "steps", "logging_strategy": "steps", "eval_strategy": "no", "save_total_limit": None}


class TrainerFailed(Exception):
    """The program ended before its training did; the message has the end of its output."""


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what the keys of ``TrainingArguments`` say when it cannot be continued exactly.

    Raises CheckpointError, which names the key, its value, and why.
    """
    for name, (allowed, why) in _SETTINGS.items():
        value = arguments.get(name, _DEFAULTS.get(name, False))
        if value not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise CheckpointError(f"{name} is {value}, which cannot be continued exactly; it must be {wanted}: {why}.")
    for name, default in (("save_steps", 500), ("logging_steps", 500), ("eval_steps", 1)):
        value = arguments.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{name} is {value!r}: give a number of steps, 1 or more")
    save, log = arguments.get("save_steps", 500), arguments.get("logging_steps", 500)
    if save % log:
        raise CheckpointError(
            f"save_steps is {save} and logging_steps is {log}: the mean of the loss since the last log line is in no "
            "checkpoint. Make save_steps a multiple of logging_steps."
        )


class ForeignTrainer:
    """Runs a training program as a child process and stores every checkpoint that it finishes.

    ::

        resume_from = checkpoints.restore_files(config, total_steps=...)
        trainer = ForeignTrainer(checkpoints, output, save_steps=10, resumed=resume_from)
        trainer.run(["llamafactory-cli", "train", "train.yaml"], cwd=work)

    - A checkpoint is taken when its ``trainer_state.json`` parses and, with several processes, a later step is in the
      log. A half-written one never is. ``training_args.bin`` is left out: it is a pickle.
    - ``save_every`` of the manager chooses among the checkpoints that the program makes; 1 means all of them.
    - The child cannot outlive this process, and is ended on every way out of :meth:`run`. What it had started itself
      (torchrun's workers) ends with it, or, after SIGKILL of the task, when the next attempt starts on this machine.
    - FAULTS fire when the log shows the step, before that step is stored. The child may be some steps further on; what
      it saved there is never used.
    - Asked to stop (SIGTERM, ``@timeout``, Ctrl-C), the newest finished checkpoint is stored. The program cannot save
      at once, so what is trained again is bounded by its ``save_steps``.

    Args:
        checkpoints: the manager, in its ``with`` block.
        output: the ``output_dir`` of the program; it must not exist, or be empty.
        log: name of the log in ``output``; each line has ``current_steps`` and ``total_steps``.
        save_steps: how often the program saves, in steps.
        resumed: what ``checkpoints.restore_files`` returned.

    Raises:
        CheckpointError: ``resumed`` is no checkpoint of a Trainer.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        output: str | os.PathLike[str],
        *,
        log: str = "trainer_log.jsonl",
        save_steps: int,
        resumed: Path | None = None,
    ) -> None:
        self._checkpoints, self._output, self._save_steps = checkpoints, Path(output), save_steps
        self._log, self._read = self._output / log, 0  # bytes of the log that were read
        self._pending: list[dict[str, Any]] = []  # log records of steps that are not dealt with yet
        self._history: list[dict[str, Any]] = []
        self._step, self._total, self._epoch = 0, -1, 0
        self._finished: tuple[int, Path] | None = None  # the newest finished checkpoint that is not stored
        if resumed is not None:
            state = read_state(resumed)
            if state is None:
                raise CheckpointError(f"{resumed} has no valid {_STATE}: give what restore_files() returned")
            self._history = [_logged(record) for record in history(state)]  # for the card, which sees no others later
            self._epoch = int(state["epoch"])
            self._step, self._total = state["global_step"], state["max_steps"]
        checkpoints.draw(lambda: self._history)

    @property
    def done(self) -> bool:
        """Whether all steps of the training are done."""
        return self._step == self._total

    def run(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        """Run ``command`` in ``cwd`` until it has done all steps. Nothing is started when none is left.

        Call it on the main thread: the child dies with the thread that started it.

        Raises:
            TrainerFailed: the program failed, was killed, or ended early.
            StopRequested: this process was asked to stop.
        """
        if self.done:
            return
        _end_orphans()
        printed, env = cwd / "output.log", {**(os.environ if env is None else env), _MARK: str(cwd.resolve())}
        with open(printed, "wb") as sink:
            process = subprocess.Popen(
                command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only, which stores what there is
                preexec_fn=partial(die_with_parent, os.getpid()),
            )  # fmt: skip
        try:
            running = True
            while running:
                running = process.poll() is None  # asked first: what it wrote until then is read below
                self._follow(running, failed=bool(process.returncode))
                self._checkpoints.stop_if_asked(self._store)
                if running:
                    time.sleep(_POLL)
        finally:
            _end(process)
        if process.returncode or not self.done:
            how, end = _how(process.returncode), printed.read_text(errors="replace").splitlines()[-_LINES:]
            raise TrainerFailed("\n".join([f"{command[0]} {how} after step {self._step}. Its output ends:", *end]))

    # ------------------------------------------------------------ how

    def _follow(self, running: bool, failed: bool) -> None:
        self._pending += self._new_records()
        while self._pending:
            record = self._pending[0]
            step, later = int(record["current_steps"]), self._pending[-1]["current_steps"] > record["current_steps"]
            directory = self._output / f"checkpoint-{step}"
            state = read_state(directory)
            if state is not None and not (directory / "rng_state.pth").exists() and not later and (running or failed):
                state = None  # of several processes, the others may still be writing
            saves = step % self._save_steps == 0 or step == record["total_steps"]
            if state is None and saves and running and not later:
                return  # it comes right after the log line
            self._pending.pop(0)
            self._note(record)
            if step > self._step:
                self._boundaries(step, directory, state)

    def _new_records(self) -> list[dict[str, Any]]:
        if not self._log.exists():
            return []
        with open(self._log, "rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]  # the line in the making comes next time
        self._read += len(whole) + 1 if whole else 0
        records = [json.loads(line) for line in whole.splitlines()]
        return [record for record in records if "loss" in record or "eval_loss" in record]  # not the summary

    def _note(self, record: dict[str, Any]) -> None:
        step, self._total = int(record["current_steps"]), int(record["total_steps"])
        metrics = {name: record[key] for name, key in _LOGGED.items() if key in record}
        self._history.append({"step": step, **_epoch(record["epoch"]), **metrics})
        if 10 * step // self._total > 10 * (step - 1) // self._total or "eval_loss" in metrics:
            numbers = "  ".join(f"{name} {value:.6g}" for name, value in metrics.items())
            print(f"epoch {record['epoch']:6.2f}  step {step:4}/{self._total}  {numbers}", flush=True)

    def _boundaries(self, step: int, directory: Path, state: dict[str, Any] | None) -> None:
        while self._step < step - 1:  # steps that were not logged
            self._step += 1
            self._checkpoints.boundary(self._step, self._store, savable=False)
        self._step = step
        metrics: dict[str, Any] = {}
        if state is not None:
            if self._finished is not None:
                shutil.rmtree(self._finished[1])
            self._finished = (step, directory)
            metrics = _metrics_of(state, step)
        self._checkpoints.boundary(step, self._store, savable=state is not None)
        if state is None:
            return
        before, self._epoch = self._epoch, int(state["epoch"])
        if self._epoch > before or self.done or any(name.startswith("eval_") for name in metrics):
            self._checkpoints.epoch_boundary(metrics, self._store, last=self.done)

    def _store(self) -> None:
        if self._finished is None:
            return
        (step, directory), self._finished = self._finished, None
        state = read_state(directory)
        assert state is not None
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nobody needs it
        state["log_history"] = [without_clock(record) for record in state["log_history"]]
        (directory / _STATE).write_text(json.dumps(state, indent=2) + "\n")
        self._checkpoints.save_files(directory, step=step, epoch=int(state["epoch"]), metrics=_metrics_of(state, step))
        shutil.rmtree(directory)


def read_state(directory: Path) -> dict[str, Any] | None:
    """``trainer_state.json`` of a checkpoint; None while the checkpoint is not complete."""
    try:
        state: Any = json.loads((directory / _STATE).read_text())
        return state if "global_step" in state else None
    except (OSError, ValueError, TypeError):
        return None


def history(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a ``trainer_state.json``, without clock times; ``epoch`` stands only in records that end one."""
    return [
        {"step": record["step"], **_epoch(record["epoch"]), **_metrics(record)}
        for record in state["log_history"]
        if "train_loss" not in record  # the summary, which counts one process only
    ]


def _logged(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name in ("step", "epoch", *_LOGGED)}


def _metrics_of(state: Mapping[str, Any], step: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in state["log_history"]:
        if record["step"] == step:
            found |= _metrics(record)
    return found


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in without_clock(record).items() if key not in ("step", "epoch")}


def _epoch(epoch: float) -> dict[str, int]:
    return {"epoch": int(epoch)} if epoch and float(epoch).is_integer() else {}


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code}" if code else "ended early, with status 0,"


def _end_orphans() -> None:
    mark, here = f"{_MARK}=".encode(), Path("/proc/self/ns/mnt")
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            marks = [pair[len(mark) :] for pair in path.read_bytes().split(b"\0") if pair.startswith(mark)]
            # its directory has been swept, so the task that made it is dead; in a container that would prove nothing
            if marks and not Path(os.fsdecode(marks[0])).exists() and (path.parent / "ns/mnt").samefile(here):
                os.kill(int(path.parent.name), signal.SIGKILL)
        except OSError:
            continue  # gone by now, or another user's


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)  # its group: torchrun is a child of the program
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
