"""``CheckpointManager``: when to save, what to keep, what to restore, and when to stop."""

import atexit
import contextlib
import dataclasses
import json
import numbers
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from .encoding import History, decode, encode, plain_json, plain_metrics
from .errors import CheckpointError, ConfigChanged, InvalidCheckpoint, StopRequested, WriteFailed
from .faults import Faults
from .manifest import (
    FileInfo,
    Manifest,
    check_config,
    check_file,
    check_names,
    differences,
    environment,
    hash_file,
    verify,
)
from .policy import KeepBest, SaveEvery, to_delete
from .report import TrainingCard
from .snapshot import Snapshot, StateFile
from .stop import StopWatch
from .store import DirectoryStore, Entry, Listing, Store, check_name, sync
from .writer import Writer

TENSORS, TREE = "state.safetensors", "state.json"
_LISTINGS = 10  # how often to look for a valid checkpoint of a run that goes on meanwhile

# names a checkpoint in its store: a dict in Metaflow's, a path in a directory; None: there is none
Reference = dict[str, Any] | str | os.PathLike[str] | None


class State(Protocol):
    """What the manager saves and restores; :class:`common.TrainState` is one.

    After a step that ends an epoch ``step_in_epoch`` still counts that epoch's steps; ``epoch_end`` sets it to 0. A
    training restored in between finds no batch left in its epoch, and still has to end it.
    """

    step: int  # optimizer steps done
    epoch: int  # epochs finished
    step_in_epoch: int  # optimizer steps done in the epoch in progress
    history: History  # a list of records, oldest first; the records never change

    def state_dict(self) -> dict[str, Any]:
        """A tree of dicts, lists, tuples, numbers, strings, bytes, tensors and numpy arrays."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Receives an equal tree; tensors come back as CPU tensors, arrays as numpy arrays, both its own to keep."""
        ...

    def log(self, metrics: Mapping[str, Any], **position: int) -> dict[str, Any]:
        """Append a record to the history and return the metrics as plain numbers."""
        ...


class CheckpointManager:
    """Saves a training when due and brings it back, bit for bit, after any kill. Use it in a ``with`` block.

    Args:
        place: ``current.checkpoint`` in a Metaflow step, ``metaflow.Checkpoint()`` in a process that the step starts,
            or a directory.
        save_every: steps (``20``), time (``"10m"``), both (``"500,10m"``), or None: at the end of each epoch.
        keep_last: how many of the newest checkpoints to keep. With 2, one may get damaged and nothing is lost.
        keep_best: ``(metric, "min" | "max")`` or ``(metric, direction, count)``: keep those too.
        resume_from: another run, ``"RUN"`` or ``"RUN@STEP"`` (with a directory as place: ``"DIRECTORY[@STEP]"``),
            that a training without a checkpoint of its own continues.
        allow_changes: continue a checkpoint although the configuration differs.
        exact: refuse a checkpoint made with other library versions, another thread count or device, instead of
            warning.
        fresh: delete what the directory holds and start anew.
        card: ``current.card["training"]`` of a step with ``@card(type="blank", id="training")``: the training is drawn
            on it, about once a second, without waiting for it. In a process that the step starts, the path of a file
            from which the step's own process draws (:func:`common.report.follow`). None: nothing is drawn.

    Attributes:
        directory: a working directory for the training's own files, gone when the process ends.

    Raises:
        CheckpointError: for bad arguments and places that cannot be written, before anything is written.
    """

    def __init__(
        self,
        place: Any = "checkpoints",
        *,
        save_every: int | str | None = None,
        keep_last: int = 2,
        keep_best: tuple[Any, ...] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        allow_changes: bool = False,
        exact: bool = False,
        fresh: bool = False,
        card: Any = None,
    ) -> None:
        self._save_every = SaveEvery.parse(save_every)
        if type(keep_last) is not int or keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last!r}: a number, and at least the newest checkpoint is kept")
        self._keep_last = keep_last
        self._keep_best = KeepBest.parse(keep_best)
        self._resume_from = None if resume_from in (None, "") else str(resume_from)
        self._allow_changes, self._exact = allow_changes, exact
        self._store = _open_store(place, fresh)
        try:
            self._events = self._store.events
            self._faults = Faults(self._events)
            self.directory = self._store.work_directory()
        except BaseException:
            self._store.close()
            raise
        # in this attempt of this task, by an earlier manager
        self._trained_here = any(event["event"] == "saved" for event in self._events.events)
        self._snapshot = Snapshot()
        self._writer = Writer()
        self._stop = StopWatch()
        self._stopped: StopRequested | None = None
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._entries: list[Entry] = []
        self._damaged: list[Entry] = []
        self._config: dict[str, Any] | None = None
        self._environment: dict[str, Any] = {}
        self._resumed_from: list[int] | None = None
        self._sequence = 0
        self._best: float | None = None
        self._last_save = (time.monotonic(), -1)  # when, and at which step
        self._saved: tuple[Any, ...] | None = None  # the position, length of history and metrics of the last save
        self._overdue = self._reserved = self._undeletable = self._changed = False
        self._saves = 0
        self._step: int | None = None  # the newest that this attempt has done
        self._blocked, self._blocking_now = 0.0, False  # seconds that saving has kept the training waiting
        self._card = TrainingCard(card, self._events, self._progress) if card else None
        self._total_steps: int | None = None
        self._open = False
        self._closed = False

    # ---------------------------------------------------------------- life

    def __enter__(self) -> "CheckpointManager":
        self._open = True
        self._stop.start()
        atexit.register(self._close)
        best = self._keep_best
        rule = {"keep_last": self._keep_last, "keep_best": best and [best.metric, best.mode, best.count]}
        try:
            self._events.add("started", pid=self._pid, where=self._store.where, **rule)
        except BaseException:
            self._stop.end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if os.getpid() != self._pid:
            return
        if kind is None:
            try:
                with self._blocking():
                    self._writer.drain()
                    self._delete_old()
            except BaseException as late:
                self._end(late)
                raise
            self._end(self._stopped)
            if self._stopped is not None:  # `except Exception` in the training swallowed it
                raise self._stopped
            return
        with contextlib.suppress(Exception):  # the error in hand matters more
            self._writer.drain()
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        details: dict[str, Any] = {}
        if error is not None:
            details = {"error": type(error).__name__, "message": str(error).splitlines()[0][:500] if str(error) else ""}
        with contextlib.suppress(WriteFailed, OSError):
            self._events.add("ended", **self._progress(), **details)
        if self._card is not None:
            self._card.close(done=error is None)
        self._open = False
        with contextlib.suppress(Exception):
            self._writer.close()
        self._stop.end(deliver=error is None)

    def _close(self) -> None:
        # at exit of the process: the working directory outlives the `with` block, the model in it is saved after
        if os.getpid() == self._pid and not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):
                self._writer.close()
            self._store.close()

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"this CheckpointManager belongs to process {self._pid}: only one process may save. Give each worker "
                "process that needs one its own."
            )
        if self._stopped is not None:
            raise self._stopped
        if not self._open:
            raise CheckpointError("use the CheckpointManager in a `with` block: its end is when everything is stored")

    # ---------------------------------------------------------------- restore

    def restore(self, state: State, config: Any = None, *, total_steps: int | None = None) -> bool:
        """Put the newest valid checkpoint into ``state``; say in one line what was found.

        Args:
            state: receives the checkpoint.
            config: what the result depends on: a dataclass or a dict of plain values, with the data set's name and
                the commit of a base model where there are such. A checkpoint made under another one is refused.
            total_steps: optimizer steps of the whole training, where known: the epoch that reaches them is always
                saved, and a start that finds them done says so.

        Returns:
            Whether there was something to restore.

        Raises:
            ConfigChanged: the checkpoint was made under another configuration (the message has the difference).
            CheckpointError: the checkpoint holds other objects than ``state``.
        """
        self.draw(lambda: state.history)
        chosen = self._choose(config, total_steps, lambda directory, manifest: _read_state(directory, manifest))
        if chosen is None:
            return False
        entry, tree = chosen
        if not isinstance(tree, dict):
            raise CheckpointError(f"{entry.where} holds files of a framework, not a TrainState")
        before = _settings(state)
        state.load_state_dict(cast("dict[str, Any]", tree))
        if self._changed:
            kept = [f"{name} {now} (not {before[name]})" for name, now in _settings(state).items()
                    if name in before and before[name] != now]  # fmt: skip
            if kept:
                said = f"{', '.join(kept)}; to change it set it after restore()"
                print(f"[checkpoints] kept as in the checkpoint: {said}", flush=True)
        return True

    def restore_files(self, config: Any = None, *, total_steps: int | None = None) -> Path | None:
        """Like :meth:`restore` for a checkpoint made of a framework's own files (:meth:`save_files`).

        Returns a private directory with the verified files, or None when there is nothing to restore.
        """
        chosen = self._choose(config, total_steps, self._private_copy)
        return None if chosen is None else chosen[1]

    def draw(self, history: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        """For adapters that call :meth:`restore_files`: where the card finds the metrics. Asked on another thread."""
        if self._card is not None:
            self._card.history = history

    def _choose(
        self, config: Any, total_steps: int | None, read: Callable[[Path, Manifest], Any]
    ) -> tuple[Entry, Any] | None:
        self._check()
        self._writer.drain()  # in the middle of a training: what it has saved counts
        self._saved = None
        self._config = _config_dict(config)
        self._environment = environment()
        self._total_steps = total_steps
        listing = self._store.listing()
        rejected = list(listing.faults)
        self._entries = [entry for entry in listing.entries if entry.managed]
        plain = len(listing.entries) - len(self._entries)
        found = len(self._entries)
        self._sequence = max((entry.sequence for entry in self._entries), default=-1) + 1
        own = self._entries
        chosen = self._newest_valid(own, None, rejected, lambda _, directory, manifest: read(directory, manifest))
        moved_from: Entry | None = None
        # a single one may be all that a kill has left of taking over another run's, which are two
        if chosen is None or (self._keep_best and len(self._entries) == 1):
            others, taken = self._newest_of_source(chosen and chosen[0], rejected, read)
            found += len(others)
            if taken is not None:
                chosen, moved_from = taken, taken[0]
        if chosen is not None and total_steps is not None and chosen[0].step >= total_steps:
            self._refuse_another_training()
        self._check_best(chosen[0] if chosen else None, rejected)
        self._damaged = [entry for entry in self._damaged if entry in self._entries]
        self._entries = [entry for entry in self._entries if entry not in self._damaged]
        self._best = self._best_saved()
        self._say(found, plain, rejected, chosen[0] if chosen else None, moved_from)
        if self._card is not None:
            self._card.start()
        return chosen

    def _newest_of_source(
        self, own: Entry | None, rejected: list[str], read: Callable[[Path, Manifest], Any]
    ) -> tuple[list[Entry], tuple[Entry, Any] | None]:
        """The checkpoints of the run to continue, and the newest valid one, which is this task's own from now on.

        None where that would not change what this task's ``own`` is.
        """
        # the run that Metaflow's `resume` continues comes first: it got further than the one that it once continued
        for source in filter(None, (self._store.origin(), self._resume_from)):
            name, step = source, ""
            if "@" in source and not (self._is_directory and Path(source).is_dir()):
                name, _, step = source.rpartition("@")
            if step and not re.fullmatch("[0-9]+", step):
                raise CheckpointError(f"resume_from is {source!r}: write RUN or RUN@STEP, with STEP a number")
            told = source == self._resume_from and own is None
            try:
                other = self._store.list_other(name)
            except CheckpointError:
                if told:
                    raise
                continue  # it died before its first checkpoint
            candidates = [entry for entry in other.entries if entry.managed]
            if own is not None and not _is_half_taken_over(own, candidates, step):
                continue
            candidates, taken = self._take_over(name, other, int(step) if step else None, rejected, read)
            if taken is not None:
                return candidates, taken
            if told:
                steps = ", ".join(str(entry.step) for entry in candidates) or "none"
                raise CheckpointError(
                    f"resume_from is {source!r}: there is no valid checkpoint to continue from. Its steps: {steps}."
                    + "".join(f"\n  rejected {text}" for text in rejected)
                )
        return [], None

    def _take_over(
        self, name: str, listing: Listing, step: int | None, rejected: list[str], read: Callable[[Path, Manifest], Any]
    ) -> tuple[list[Entry], tuple[Entry, Any] | None]:
        candidates: list[Entry] = []

        def read_and_adopt(entry: Entry, directory: Path, manifest: Manifest) -> Any:
            content = read(directory, manifest)
            self._adopt(entry, directory, manifest, candidates)
            return content

        faults, taken = list[str](), None
        for _ in range(_LISTINGS):
            before, candidates = candidates, [entry for entry in listing.entries if entry.managed]
            if candidates == before:
                break  # else that run goes on: it has deleted what was listed, and has a newer one
            faults = list(listing.faults)
            taken = self._newest_valid(candidates, step, faults, read_and_adopt)
            if taken is not None:
                break
            listing = self._store.list_other(name)
        rejected += faults
        return candidates, taken

    def _newest_valid(
        self, entries: list[Entry], step: int | None, rejected: list[str], read: Callable[[Entry, Path, Manifest], Any]
    ) -> tuple[Entry, Any] | None:
        for entry in reversed(entries):
            if step is not None and entry.step != step:
                continue
            try:
                directory = self._store.open(entry)
                manifest = Manifest.read(directory)
                self._check_fingerprint(manifest, entry)
                content = read(entry, directory, manifest)
            except InvalidCheckpoint as error:
                rejected.append(f"step {entry.step} ({error})")
                self._damaged.append(entry)
                continue
            return entry, content
        return None

    def _check_best(self, restored: Entry | None, rejected: list[str]) -> None:
        # a damaged one would keep those that are not as good from being saved, and from being kept
        if self._keep_best is None or restored is None:
            return
        valid = 0
        for entry in self._keep_best.rank([entry for entry in self._entries if entry not in self._damaged]):
            if valid == self._keep_best.count:
                return
            try:
                if entry is not restored:
                    self._store.verify(entry)
                valid += 1
            except InvalidCheckpoint as error:
                rejected.append(f"the best, step {entry.step} ({error})")
                self._damaged.append(entry)

    def _check_fingerprint(self, manifest: Manifest, entry: Entry) -> None:
        where = f"the checkpoint of step {entry.step} ({entry.where})"
        try:
            check_config(manifest, self._config or {}, where)
        except ConfigChanged as error:
            if not self._allow_changes:
                self._refuse_another_training(error)
                raise
            self._changed = True
            print(f"[checkpoints] continuing on purpose: {error}".rpartition("\n")[0], flush=True)
        lines = differences(manifest.environment, self._environment)
        if lines:
            message = f"{where} was made in another environment: " + "; ".join(lines)
            if self._exact:
                raise ConfigChanged(
                    f"{message}. With --exact that is refused: the result could differ in the last bits."
                )
            print(f"[checkpoints] warning: {message}; the result may differ in the last bits", flush=True)

    def _refuse_another_training(self, cause: Exception | None = None) -> None:
        if self._trained_here:
            raise CheckpointError(
                f"an earlier CheckpointManager has trained in this attempt of {self._store.where}: a second training "
                "would take the checkpoints of the first for its own. Give each a task of its own (for folds: "
                "foreach over their numbers); to go on with the first under another configuration say allow_changes."
            ) from cause

    def _adopt(self, chosen: Entry, directory: Path, manifest: Manifest, candidates: list[Entry]) -> None:
        # what is restored is committed to this task at once, with the best one if that is another
        copies = [(manifest, self._copy_of(directory, manifest))]
        best = self._keep_best.rank([e for e in candidates if e.sequence <= chosen.sequence]) if self._keep_best else []
        for entry in (entry for entry in best[:1] if entry != chosen):
            with contextlib.suppress(InvalidCheckpoint):  # it is damaged
                directory = self._store.open(entry)
                manifest = Manifest.read(directory)
                copies.insert(0, (manifest, self._copy_of(directory, manifest)))
        for manifest, staged in copies:
            config = manifest.config if self._config is None else self._config
            manifest = dataclasses.replace(manifest, sequence=self._sequence, config=config)
            manifest.write(staged)
            self._entries.append(self._store.commit(staged, manifest))
            self._sequence += 1

    def _copy_of(self, directory: Path, manifest: Manifest) -> Path:
        staged = self._store.stage()
        _copy_verified(directory, manifest, staged)
        for name in manifest.files:
            sync(staged / name)
        return staged

    def _say(self, found: int, plain: int, rejected: list[str], chosen: Entry | None, moved_from: Entry | None) -> None:
        attempt = self._events.attempt
        self._events.add("found", checkpoints=found, rejected=rejected, total_steps=self._total_steps)
        parts = [f"attempt {attempt}: found {found} checkpoint{'' if found == 1 else 's'}"]
        if plain:
            parts.append(f"{plain} of plain save() left alone")
        if rejected:
            parts.append("rejected " + ", ".join(rejected))
        if chosen is not None:
            self._last_save = (time.monotonic(), chosen.step)
            place = f"resumed at step {chosen.step}"
            if chosen.epoch:
                place += f" (epoch {chosen.epoch})"
            parts.append(place + (f" of {moved_from.where}" if moved_from else ""))
            if self._total_steps is not None and chosen.step >= self._total_steps:
                parts.append("all steps are done" + (", --fresh starts anew" if self._is_directory else ""))
            self._events.add("resumed", step=chosen.step, epoch=chosen.epoch, source=chosen.where)
            self._resumed_from = None
        elif found or rejected:
            parts.append("NONE IS VALID, training starts again from step 0")
        else:
            parts.append("training starts at step 0")
        print("[checkpoints] " + "; ".join(parts), flush=True)

    @property
    def _is_directory(self) -> bool:
        return isinstance(self._store, DirectoryStore)

    # ---------------------------------------------------------------- save

    def step(self, state: State, metrics: Mapping[str, Any] | None = None) -> None:
        """Count an optimizer step, record its metrics if given, save when due, stop when asked.

        Raises:
            StopRequested: SIGTERM, Ctrl-C or the approach of ``@timeout``; the step is saved. Raised again by every
                later call.
            WriteFailed: the checkpoint before this one could not be written.
            CheckpointError: a metric is not a finite number.
        """
        with self._lock:
            self._check()
            state.step += 1
            state.step_in_epoch += 1
            if not self._reserved and not self._saves:  # only now do most optimizers have their state
                self._reserved = True
                arrays = encode(state.state_dict())[1].values()
                size, on_gpu = sum(a.nbytes for a in arrays), any(a.on_gpu for a in arrays)
                self._writer.submit(lambda: self._snapshot.reserve(size, pinned=on_gpu))
            plain = state.log(metrics) if metrics else {}
            self._boundary(state.step, lambda: self._save_state(state, plain))

    def epoch_end(self, state: State, metrics: Mapping[str, Any] | None = None) -> None:
        """Count an epoch, record its metrics, save when due or when the metric of ``keep_best`` is better than ever.

        The last epoch (see ``total_steps`` of :meth:`restore`) is always saved. Raises as :meth:`step` does.
        """
        with self._lock:
            self._check()
            metrics = metrics or {}
            self._check_epoch(metrics)
            state.epoch += 1
            state.step_in_epoch = 0
            plain = state.log(metrics, epoch=state.epoch)
            last = self._total_steps is not None and state.step >= self._total_steps
            self._epoch_boundary(plain, lambda: self._save_state(state, plain), last)

    def save(self, state: State, metrics: Mapping[str, Any] | None = None, *, name: str | None = None) -> None:
        """Save now. A checkpoint with a ``name`` ([A-Za-z0-9_-]) is never deleted by ``keep_last``."""
        with self._lock, self._blocking():
            self._check()
            self._save_state(state, plain_metrics(metrics, state.step), None if name is None else check_name(name))

    def save_files(
        self,
        source: str | os.PathLike[str],
        *,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        name: str | None = None,
        move: bool = False,
        tree: Any = None,
        write: Callable[[Any, Path], None] | None = None,
    ) -> None:
        """Save a directory of a framework's own files as the checkpoint of ``step``.

        The files are copied before this returns, so the framework may change or delete them; hashing and committing
        happen in the background. With ``move`` they are moved, which costs nothing within a file system.

        What takes long to write can be written in the background, too: ``tree``, nested dicts and lists with torch
        tensors, is copied before this returns, and ``write(copy, directory)`` is called there.
        """
        with self._lock, self._blocking():
            self._check()
            files = sorted(path for path in Path(source).rglob("*") if path.is_file())
            if not isinstance(cast("object", step), numbers.Integral) or step < 0:
                raise CheckpointError(f"save_files: step is {step!r}, it must be a number, 0 or more")
            step = int(step)
            if not files and write is None:
                raise CheckpointError(f"save_files: {source} is missing or has no files")
            plain = plain_metrics(metrics, step)
            manifest = self._manifest(step, epoch, plain, None if name is None else check_name(name))
            self._writer.drain()
            copied = None if write is None else self._snapshot.copy(tree)
            staged = self._stage(step)
            for path in files:
                target = staged / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                if move and not path.is_symlink():
                    shutil.move(path, target)
                else:
                    shutil.copyfile(path, target)

            def finish(directory: Path) -> dict[str, FileInfo]:
                if write is not None:
                    write(copied, directory)
                self._faults.in_save(self._saves, step)
                written = sorted(path for path in directory.rglob("*") if path.is_file())
                for path in written:
                    sync(path)
                return {str(path.relative_to(directory)): hash_file(path) for path in written}

            self._submit(manifest, staged, finish)

    def boundary(self, step: int, save: Callable[[], None], *, savable: bool = True) -> None:
        """For adapters of frameworks that own the loop: ``step`` is done; call ``save`` when due or asked to stop.

        With ``savable=False`` only an earlier step can be saved (XGBoost inside a segment): a checkpoint that falls due
        waits for the next savable step; asked to stop, ``save`` is called all the same and saves that earlier step.
        """
        with self._lock:
            self._check()
            self._boundary(step, save, savable)

    def epoch_boundary(self, metrics: Mapping[str, Any], save: Callable[[], None], *, last: bool) -> None:
        """For those adapters: an epoch, or the ``last``, is done; call ``save`` when :meth:`epoch_end` would."""
        with self._lock:
            self._check()
            self._check_epoch(metrics)
            self._epoch_boundary(metrics, save, last)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step``, by ``save_every``."""
        return self._save_every.due(step, self._last_save[0])

    def stop_if_asked(self, save: Callable[[], None]) -> None:
        """Save and raise StopRequested when a signal, the spot notice or ``@timeout`` asks for it."""
        reason = self._stop.reason()
        if reason is None:
            if self._stop.may_be_last:  # so that each attempt gets further, by this step at least
                with self._blocking():
                    save()
                    self._writer.drain()
            return
        with self._blocking():
            save()
            self._writer.drain()
        step = self._last_save[1]
        self._stopped = StopRequested(
            f"stopped at step {step}: {reason}. The state is saved; a retry continues from it."
            if step >= 0
            else f"stopped before the first checkpoint: {reason}. A retry starts at step 0."
        )
        print(f"[checkpoints] {self._stopped}", flush=True)
        raise self._stopped

    def _boundary(self, step: int, save: Callable[[], None], savable: bool = True) -> None:
        first, self._step = self._step is None, step
        if first:  # how long it took to get going; the card's thread adds how far it got
            self._events.add("progress", step=step)
        self._faults.at_step(step)
        self._overdue = self._overdue or self.is_due(step)
        if self._overdue and savable:
            self._overdue = False
            with self._blocking():
                save()
        self.stop_if_asked(save)

    @contextlib.contextmanager
    def _blocking(self) -> Generator[None]:
        if self._blocking_now:  # a save inside of a save: an adapter's
            yield
            return
        self._blocking_now, began = True, time.monotonic()
        try:
            yield
        finally:
            self._blocking_now = False
            self._blocked += time.monotonic() - began

    def _progress(self) -> dict[str, Any]:
        return {"step": self._step, "blocked": round(self._blocked, 4)}

    def _check_epoch(self, metrics: Mapping[str, Any]) -> None:
        if self._keep_best and self._keep_best.metric not in metrics:
            raise CheckpointError(
                f"keep_best names {self._keep_best.metric!r}, but the metrics of this epoch are {sorted(metrics)}"
            )

    def _epoch_boundary(self, metrics: Mapping[str, Any], save: Callable[[], None], last: bool) -> None:
        due = self._save_every.per_epoch or self._save_every.overdue(self._last_save[0])
        if due or last or self._is_best(metrics):
            with self._blocking():
                save()
        self.stop_if_asked(save)

    def _is_best(self, metrics: Mapping[str, Any]) -> bool:
        if self._keep_best is None:
            return False
        value = metrics[self._keep_best.metric]
        try:
            value = float("" if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise CheckpointError(
                f"keep_best: the metric {self._keep_best.metric!r} is {value!r}, which is not a number"
            ) from None
        return self._best is None or (value < self._best if self._keep_best.mode == "min" else value > self._best)

    def _manifest(self, step: int, epoch: int | None, metrics: dict[str, Any], name: str | None) -> Manifest:
        manifest = Manifest(
            step=step,
            epoch=epoch,
            sequence=self._sequence,
            metrics=metrics,
            config=self._config or {},
            environment=self._environment or environment(),
            files={},
            name=name,
            resumed_from=self.resumed_from,
        )
        self._sequence += 1
        return manifest

    def _save_state(self, state: State, metrics: dict[str, Any], name: str | None = None) -> None:
        position = (state.step, state.epoch, len(state.history))
        saved = self._saved
        if name is None and saved and saved[:-1] == position and (not metrics or metrics == saved[-1]):
            return  # nothing has happened since
        self._writer.drain()  # the buffer is in use until then
        tree, arrays = encode(state.state_dict())
        self._snapshot.take(arrays)
        arrays.clear()  # now, not while the writer wants the interpreter
        manifest = self._manifest(state.step, state.epoch, metrics, name)

        def write(directory: Path) -> dict[str, FileInfo]:
            files: dict[str, FileInfo] = {}
            files[TENSORS] = FileInfo(*self._snapshot.write(directory / TENSORS))
            self._faults.in_save(number, state_step)
            with open(directory / TREE, "x", encoding="utf-8") as file:
                # not json.dump, which encodes in Python and keeps the training from the interpreter meanwhile
                file.write(json.dumps(tree, separators=(",", ":"), allow_nan=False))
                file.flush()
                os.fsync(file.fileno())
            files[TREE] = hash_file(directory / TREE)
            return files

        self._saves += 1
        number, state_step = self._saves, state.step
        self._submit(manifest, None, write)
        self._saved = (*position, metrics)

    def _stage(self, step: int) -> Path:
        self._saves += 1
        try:
            return self._store.stage()
        except OSError as error:
            raise self._write_failed(step, error) from error

    def _submit(self, manifest: Manifest, staged: Path | None, write: Callable[[Path], dict[str, FileInfo]]) -> None:
        began = time.monotonic()

        def job() -> None:
            directory = staged
            try:
                directory = directory or self._store.stage()
                complete = dataclasses.replace(manifest, files=write(directory))
                complete.write(directory)
                entry = self._store.commit(directory, complete)
            except Exception as error:
                if directory is not None:
                    shutil.rmtree(directory, ignore_errors=True)
                self._saved = None  # whoever frees some space can save this step again
                self._best = self._best_saved()
                if isinstance(error, OSError):
                    raise self._write_failed(manifest.step, error) from error
                raise
            self._entries.append(entry)
            self._stop.saved(time.monotonic() - began)
            size = sum(info.size for info in complete.files.values())
            took, blocked = round(time.monotonic() - began, 4), round(self._blocked, 4)
            self._note("saved", step=entry.step, epoch=entry.epoch, metrics=entry.metrics, bytes=size, seconds=took,
                       blocked=blocked)  # fmt: skip
            self._delete_old()

        self._writer.submit(job)
        self._last_save = (time.monotonic(), manifest.step)
        if self._keep_best and self._keep_best.metric in manifest.metrics and self._is_best(manifest.metrics):
            self._best = float(manifest.metrics[self._keep_best.metric])

    def _best_saved(self) -> float | None:
        ranked = self._keep_best.rank(self._entries) if self._keep_best else []
        return self._keep_best.value(ranked[0]) if self._keep_best and ranked else None

    def _note(self, event: str, **details: Any) -> None:
        # of what is safe already: that the disk has no room for a line about it is no reason to end a training
        with contextlib.suppress(WriteFailed, OSError):
            self._events.add(event, **details)

    def _write_failed(self, step: int, error: OSError) -> WriteFailed:
        kept = (
            f"the checkpoint of step {self._entries[-1].step} is kept" if self._entries else "there is none before it"
        )
        return WriteFailed(
            f"the checkpoint of step {step} could not be written to {self._store.where}: {error.strerror or error}; "
            f"{kept}. Free some space or choose another place, then start again: the training continues from there."
        )

    def _delete_old(self) -> None:
        # runs after a commit only, so there is always a newer valid checkpoint than what goes
        doomed = [*self._damaged, *to_delete(self._entries, self._keep_last, self._keep_best)]
        for entry in doomed if self._saves else []:
            self._entries = [other for other in self._entries if other is not entry]
            try:
                self._store.delete(entry)
            except FileNotFoundError:
                continue  # somebody else did
            except Exception as error:  # the training goes on, and the next attempt tries again
                if not self._undeletable:
                    print(f"[checkpoints] warning: {entry.where} could not be deleted and is left: {error}", flush=True)
                self._undeletable = True
                continue
            self._note("deleted", step=entry.step)
        if self._saves:
            self._damaged = []

    # ---------------------------------------------------------------- look and load

    @property
    def latest(self) -> Any:
        """The newest checkpoint's reference: a dict that Metaflow loads, or a path. None before the first one."""
        self._settle()
        return self._entries[-1].reference if self._entries else None

    @property
    def best(self) -> Any:
        """The reference of the checkpoint with the best metric of ``keep_best``; None when there is none."""
        self._settle()
        ranked = self._keep_best.rank(self._entries) if self._keep_best else []
        return ranked[0].reference if ranked else None

    @property
    def resumed_from(self) -> list[int]:
        """The steps that the attempts of this training resumed from, in order."""
        if self._resumed_from is None:  # asked for in every save, by when the log may be long
            self._resumed_from = [event["step"] for event in self._events.all() if event["event"] == "resumed"]
        return list(self._resumed_from)

    def load_state(self, reference: Reference) -> dict[str, Any]:
        """The verified state of a checkpoint (``checkpoints.latest``, ...) as a private tree. Raises InvalidCheckpoint.

        For the best one use :meth:`load_best`, which takes the next best when that one is damaged.
        """
        self._settle()
        directory = self._store.open(self._find(reference))
        return _read_state(directory, Manifest.read(directory))

    def load_best(self) -> dict[str, Any]:
        """The verified state with the best metric of ``keep_best``, as a private tree.

        A damaged one is named and the next best is taken. Raises InvalidCheckpoint when none is left.
        """
        return self._best_valid(self.load_state)

    def load_best_files(self) -> Path:
        """Like :meth:`load_best` for a checkpoint made of a framework's own files: a private directory with them."""
        return self._best_valid(self.load_files)

    def _best_valid(self, load: Callable[[Reference], Any]) -> Any:
        self._settle()
        if self._keep_best is None:
            raise CheckpointError("load_best needs CheckpointManager(keep_best=(metric, direction))")
        for entry in self._keep_best.rank(self._entries):
            try:
                return load(entry.reference)
            except InvalidCheckpoint as error:
                print(f"[checkpoints] the best checkpoint, step {entry.step}, is damaged: {error}", flush=True)
                self._events.add("rejected", step=entry.step, reason=str(error))
        raise InvalidCheckpoint(f"no valid checkpoint has the metric {self._keep_best.metric!r} of keep_best")

    def load_files(self, reference: Reference, into: str | os.PathLike[str] | None = None) -> Path:
        """A private copy of a checkpoint's files, also of one that plain ``save()`` wrote, which is not verified.

        Raises InvalidCheckpoint when the files are not what the manifest says.
        """
        self._settle()
        entry = self._find(reference)
        directory = self._store.open(entry)
        target = self._store.work_directory() if into is None else Path(into)
        if entry.managed:
            return self._private_copy(directory, Manifest.read(directory), target)
        if isinstance(reference, dict) and reference.get("storage_format") == "tar":
            raise CheckpointError(
                f"{entry.where} was saved as a tar, which could write outside of its directory: load it with "
                "current.checkpoint.load if you trust who wrote it"
            )
        shutil.copytree(directory, target, dirs_exist_ok=True)
        return target

    def _find(self, reference: Reference) -> Entry:
        if reference is None:
            raise CheckpointError("there is no such checkpoint yet")
        for entry in self._entries:
            if entry.reference == reference:
                return entry
        managed = True
        if isinstance(reference, dict):
            metadata: dict[str, Any] = reference.get("metadata") or {}
            managed = bool(metadata.get("managed"))
        return Entry(str(reference), reference, str(reference), managed=managed)

    def _settle(self) -> None:
        if os.getpid() == self._pid:
            self._writer.drain()

    def _private_copy(self, directory: Path, manifest: Manifest, into: Path | None = None) -> Path:
        target = self._store.work_directory() if into is None else into
        target.mkdir(parents=True, exist_ok=True)
        _copy_verified(directory, manifest, target)
        return target


def _settings(state: State) -> dict[str, Any]:
    """What an optimizer's state brings along beside the state: learning rate, weight decay and such, by name."""
    objects: Mapping[str, Any] = getattr(state, "objects", {})
    return {
        f"{name}.{key}" + (f" of group {number}" if number else ""): value
        for name, thing in objects.items()
        for number, group in enumerate(cast("Sequence[dict[str, Any]]", getattr(thing, "param_groups", ())))
        for key, value in group.items()
        if isinstance(value, (int, float, tuple))
    }


def _is_half_taken_over(only: Entry, candidates: Sequence[Entry], step: str) -> bool:
    """Whether ``only``, a task's single checkpoint, is another run's best, which was not yet followed by its newest."""
    newest = max((entry.step for entry in candidates if not step or entry.step == int(step)), default=-1)
    same = [entry for entry in candidates if (entry.step, entry.epoch) == (only.step, only.epoch)]
    return only.step < newest and any(entry.metrics == only.metrics for entry in same)


def _open_store(place: Any, fresh: bool) -> Store:
    if isinstance(place, (str, os.PathLike)):
        return DirectoryStore(cast("str | os.PathLike[str]", place), fresh=fresh)
    if not (hasattr(place, "save") and hasattr(place, "load") and hasattr(place, "list")):
        raise CheckpointError(
            f"place is a {type(place).__name__}: give current.checkpoint, metaflow.Checkpoint() or a directory"
        )
    if fresh:
        raise CheckpointError("fresh deletes a directory of checkpoints; a Metaflow run is fresh on its own")
    from .metaflow_store import MetaflowStore

    return MetaflowStore()


def _config_dict(config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    plain = plain_json(config, "config")
    if not isinstance(plain, dict):
        raise CheckpointError(f"config is a {type(config).__name__}: give a dataclass or a dict of plain values")
    return cast("dict[str, Any]", plain)


@contextlib.contextmanager
def _complete() -> Generator[None]:
    # a run that is continued while it goes on may have deleted the file just now
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidCheckpoint(f"{Path(error.filename or 'a file').name} is missing") from error


@_complete()
def _read_state(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """Read and verify in one pass: the bytes that are hashed are the bytes that are used."""
    check_names(directory, manifest)
    if TENSORS not in manifest.files:
        raise CheckpointError(f"the checkpoint of step {manifest.step} holds files of a framework, not a TrainState")
    verify(directory, dataclasses.replace(manifest, files={TREE: manifest.files[TREE]}))
    tree = json.loads((directory / TREE).read_text(encoding="utf-8"))
    expected, size = manifest.files[TENSORS], (directory / TENSORS).stat().st_size
    check_file(TENSORS, expected, FileInfo(size, expected.xxh3_128))  # the size, before its header is believed
    tensors = StateFile(directory / TENSORS)
    state = decode(tree, tensors.tensor, tensors.array)
    check_file(TENSORS, expected, FileInfo(tensors.size, tensors.read()))
    return state


@_complete()
def _copy_verified(directory: Path, manifest: Manifest, target: Path) -> None:
    check_names(directory, manifest)
    for name in manifest.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(directory / name, target / name)
    verify(target, manifest)
