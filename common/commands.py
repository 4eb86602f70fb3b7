"""What ``python -m common`` does, without its words: find checkpoints, check, compare, export and delete them.

A *target* is a flow, run, step or task (``Flow/run/step/task``) on the configured datastore, a directory of
checkpoints, or a checkpoint's key; ``target@which`` names one checkpoint of it by step, by name, or as ``latest``.
"""

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from .errors import CheckpointError, InvalidCheckpoint
from .events import Event, parse
from .manifest import FILE_NAME, Manifest, check_names, differences, verify
from .policy import KeepBest, to_delete
from .store import DirectoryStore, Entry, entry_of
from .tensors import Tensor, tensors_of, write_safetensors

Tick = Callable[[int], None]  # told how many bytes more are done

TENSORS = "state.safetensors"
_KEY = "mf.checkpoints/checkpoints/artifacts/"
_HUGGING_FACE = ("model_index.json", "adapter_config.json", "config.json")  # one of them is in every save_pretrained
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_OURS = {FILE_NAME, TENSORS, "state.json", "trainer_state.json"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as it is listed.

    Attributes:
        entry: what the store knows of it.
        task: the pathspec of its task, or the directory it is in.
        attempt: of the task; None in a directory.
        created: when, in UTC.
        size: bytes, None when unknown.
        metadata: what plain ``save(metadata=...)`` was given, apart from numbers, which count as metrics.
        manifest: None when there is none that can be read.
        fault: what is wrong with it, as far as names and sizes tell; None: nothing.
        kept: why retention kept it.
    """

    entry: Entry
    task: str
    attempt: int | None
    created: datetime
    size: int | None
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    manifest: Manifest | None = None
    fault: str | None = None
    kept: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What a person calls it."""
        name = Path(self.entry.key).name
        return f"step {self.entry.step}" if self.entry.step >= 0 else name

    def plain(self) -> dict[str, Any]:
        """It as plain JSON."""
        entry = self.entry
        return {
            "task": self.task,
            "attempt": self.attempt,
            "key": entry.key,
            "name": entry.name,
            "step": entry.step if entry.step >= 0 else None,
            "epoch": entry.epoch,
            "metrics": entry.metrics,
            "metadata": self.metadata,
            "bytes": self.size,
            "created": self.created.isoformat(timespec="seconds"),
            "managed": entry.managed,
            "valid": self.fault is None if self.manifest or self.fault else None,
            "fault": self.fault,
            "kept": list(self.kept),
        }


class Deleted(CheckpointError):
    """A checkpoint was deleted while it was read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(
            f"{checkpoint.label} of {checkpoint.task} was deleted while it was read: a training that is running keeps "
            "some of its checkpoints only. Try again"
        )


class Place(Protocol):
    """Where checkpoints are."""

    checkpoints: list[Checkpoint]  # task by task, oldest first
    faults: list[str]  # what could not be read
    events: dict[str, list[Event]]  # of each task

    def open(self, checkpoint: Checkpoint) -> AbstractContextManager[Path]:
        """A directory with its files, to be read only."""
        ...

    def deleted(self, checkpoint: Checkpoint) -> bool:
        """Whether it was deleted after it was listed."""
        ...

    def running(self, task: str) -> bool:
        """Whether the task may still need its checkpoints."""
        ...

    def deleter(self) -> AbstractContextManager[Callable[[Checkpoint], None]]:
        """A function that deletes. Raises CheckpointError where a training is writing."""
        ...


class _Directory:
    def __init__(self, directory: Path) -> None:
        self._directory, self.faults = directory, list[str]()
        logs = [path for path in (directory / "events").glob("*.jsonl") if path.stem.isdigit()]
        logs.sort(key=lambda path: int(path.stem))
        self.events = {str(directory): [event for path in logs for event in parse(path.read_text("utf-8", "replace"))]}
        found: list[Checkpoint] = []
        for path in directory.iterdir():
            if (path / FILE_NAME).exists() or _is_step(path):
                with suppress(FileNotFoundError):  # the training that is running has just deleted it
                    found.append(self._read(path))
        self.checkpoints = _explain(sorted(found, key=lambda item: (item.entry.step, item.entry.sequence)), self.events)

    def _read(self, path: Path) -> Checkpoint:
        where, sizes = str(self._directory), {str(p.relative_to(path)): p.stat().st_size for p in _files(path)}
        created, size = datetime.fromtimestamp(path.stat().st_mtime, UTC), sum(sizes.values())
        try:
            manifest = Manifest.read(path)
        except CheckpointError as error:
            path.stat()  # it is deleted as a whole
            step = path.name.split("-")[1] if _is_step(path) else -1
            entry = Entry(path.name, str(path), str(path), int(step))
            return Checkpoint(entry, where, None, created, size, fault=str(error))
        entry = entry_of(manifest, path.name, str(path), str(path))
        created = datetime.fromisoformat(manifest.created)
        return Checkpoint(
            entry, where, None, created, size, manifest=manifest, fault=_fault(manifest, dict[str, int | None](sizes))
        )

    def open(self, checkpoint: Checkpoint) -> AbstractContextManager[Path]:
        return nullcontext(Path(checkpoint.entry.reference))

    def deleted(self, checkpoint: Checkpoint) -> bool:
        return not Path(checkpoint.entry.reference).exists()

    def running(self, task: str) -> bool:
        return False  # whoever writes holds a lock that deleter() asks for

    @contextmanager
    def deleter(self) -> Generator[Callable[[Checkpoint], None]]:
        store = DirectoryStore(self._directory)
        try:
            yield lambda checkpoint: store.delete(checkpoint.entry)
        finally:
            store.close()


class _Datastore:
    def __init__(self, pathspec: str, key: str | None = None) -> None:
        from .metaflow_store import Reader, entries_of

        parts = pathspec.split("/") if pathspec else []
        if len(parts) > 4 or any(not re.fullmatch(r"[\w.:-]+", part) or part in (".", "..") for part in parts):
            raise CheckpointError(
                f"{pathspec!r} is neither a directory nor a flow, run, step or task: write Flow/run/step/task or the "
                "beginning of it"
            )
        self._reader = Reader()
        if key is not None:
            pathspec = self._reader.record(key)["pathspec"]
        records, self.events, self.faults = self._reader.records(pathspec)
        files = self._reader.files([record["key"] for record in records if record.get("storage_format") != "tar"])
        manifests = self._reader.texts([f"{key}/{FILE_NAME}" for key in files])
        found: list[Checkpoint] = []
        for entry in entries_of(records):
            record: dict[str, Any] = entry.reference
            given: dict[str, Any] = record.get("metadata") or {}
            manifest, fault = None, None
            if entry.managed:
                manifest, fault = _manifest_of(manifests.get(f"{entry.key}/{FILE_NAME}"), files.get(entry.key, {}))
                given = {}
            elif not files.get(entry.key, True):
                fault = "all its files are missing"
            numbers = {name: value for name, value in given.items() if type(value) in (int, float)}
            if not entry.managed:
                step, epoch = (given.get(name) for name in ("step", "epoch"))
                entry = dataclasses.replace(
                    entry,
                    step=step if type(step) is int else -1,
                    epoch=epoch if type(epoch) is int else None,
                    metrics={name: value for name, value in numbers.items() if name not in ("step", "epoch")},
                )
            # what plain save() writes is the local time of the machine
            created = datetime.fromisoformat(record["created_on"]).astimezone(UTC)
            metadata = {name: value for name, value in given.items() if name not in numbers}
            found.append(
                Checkpoint(entry, record["pathspec"], record["attempt"], created, record.get("size"), metadata,
                           manifest, fault)
            )  # fmt: skip
        faulty = [item for item in found if item.fault]
        if faulty:  # or a running task has just deleted them
            gone = self._deleted(faulty)
            found = [item for item in found if item.entry.key not in gone]
        # those with a manifest are numbered; of the others the clock knows the order
        found.sort(key=lambda item: (item.task, item.entry.sequence, item.created))
        self.checkpoints = _explain(found, self.events)

    @contextmanager
    def open(self, checkpoint: Checkpoint) -> Generator[Path]:
        if checkpoint.entry.reference.get("storage_format") == "tar":
            raise CheckpointError(
                f"{checkpoint.entry.where} was saved as a tar, which could write outside of its directory: load it "
                "with metaflow.Checkpoint().load if you trust who wrote it"
            )
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
            self._reader.load(checkpoint.entry.reference, Path(name))
            yield Path(name)

    def deleted(self, checkpoint: Checkpoint) -> bool:
        return bool(self._deleted([checkpoint]))

    def _deleted(self, checkpoints: Sequence[Checkpoint]) -> set[str]:
        wait = 0.5 if any(map(self.running, {item.task for item in checkpoints})) else 0.0
        return self._reader.deleted([item.entry.key for item in checkpoints], wait)

    def running(self, task: str) -> bool:
        return not self._reader.finished(task)

    @contextmanager
    def deleter(self) -> Generator[Callable[[Checkpoint], None]]:
        yield lambda checkpoint: self._reader.delete(checkpoint.entry.reference)


def find(target: str = "") -> tuple[Place, list[Checkpoint]]:
    """The place and the checkpoints that ``target`` names; "" is everything on the datastore.

    Raises CheckpointError when it names nothing.
    """
    if not target:
        place: Place = _Datastore("")
        return place, place.checkpoints
    path, which = Path(target).expanduser(), ""
    if not path.is_dir() and not target.startswith(_KEY):
        target, _, which = target.rpartition("@") if "@" in target else (target, "", "")
        path = Path(target).expanduser()
    if path.is_dir() and (path / FILE_NAME).exists() and not which:  # one checkpoint
        path, which = path.resolve().parent, path.resolve().name
    if path.is_dir():
        place = _Directory(path)
    elif target.startswith(_KEY):
        place, which = _Datastore("", key=target), target
    elif target.startswith((".", "/", "~")):
        raise CheckpointError(f"there is no directory {target}")
    else:
        place = _Datastore(target)
    found = [item for item in place.checkpoints if _answers_to(item, which)]
    if which == "latest":
        found = list({item.task: item for item in place.checkpoints}.values())
    if found:
        return place, found
    if place.checkpoints and which:
        there = ", ".join(sorted({item.label for item in place.checkpoints})[:8])
        raise CheckpointError(f"{target} has no checkpoint {which!r}; it has {there}")
    if place.faults:
        raise InvalidCheckpoint(f"{target} has no checkpoint that can be read: {place.faults[0]}")
    raise CheckpointError(f"there are no checkpoints of {target}: is the name right, and is this the datastore of it?")


def find_one(target: str) -> tuple[Place, Checkpoint]:
    """The one checkpoint that ``target`` names, or the newest of its task. Raises CheckpointError."""
    place, found = find(target)
    tasks = sorted({item.task for item in found})
    if len(tasks) > 1:
        raise CheckpointError(
            f"{target} names checkpoints of {len(tasks)} tasks: write which, such as {tasks[-1]}@{found[-1].entry.step}"
            if found[-1].entry.step >= 0
            else f"{target} names checkpoints of {len(tasks)} tasks: write which, such as {tasks[-1]}"
        )
    return place, found[-1]


def check(place: Place, checkpoint: Checkpoint, tick: Tick) -> list[str] | None:
    """What is wrong with a checkpoint, file by file, by size and hash; None when it has no manifest to go by.

    Raises Deleted.
    """
    if not checkpoint.entry.managed:
        return [checkpoint.fault] if checkpoint.fault else None
    with _open(place, checkpoint) as directory:
        try:
            faults = _check(directory, Manifest.read(directory), tick)
        except CheckpointError as error:
            faults = [str(error)]
        if faults and place.deleted(checkpoint):
            raise Deleted(checkpoint)
        return faults


@contextmanager
def _open(place: Place, checkpoint: Checkpoint) -> Generator[Path]:
    """A directory with its files. Raises Deleted for what went wrong because they are there no longer."""
    try:
        with place.open(checkpoint) as directory:
            yield directory
    except Deleted:
        raise
    except Exception as error:
        if place.deleted(checkpoint):
            raise Deleted(checkpoint) from error
        raise


def _check(directory: Path, manifest: Manifest, tick: Tick) -> list[str]:
    faults: list[str] = []
    for name, info in manifest.files.items():
        try:
            verify(directory, dataclasses.replace(manifest, files={name: info}))
        except InvalidCheckpoint as error:
            faults.append(str(error))
        tick(info.size)
    present = {str(path.relative_to(directory)) for path in _files(directory)}
    return faults + [f"{name} does not belong to it" for name in sorted(present - {*manifest.files, FILE_NAME})]


def compare(left: tuple[Place, Checkpoint], right: tuple[Place, Checkpoint], tick: Tick) -> dict[str, Any]:
    """How two checkpoints differ, as plain JSON.

    Returns:
        ``tensors``: one item for each that both have and that differs, the model's first, with the share of values that
        changed, the largest change, and the change of the whole in relation to it; ``equal``: how many do not differ;
        ``only_in_a``, ``only_in_b``: names; ``files``: other files that differ; ``position``, ``metrics``, ``config``,
        ``environment``: lines ``key: old -> new``.

    Raises:
        InvalidCheckpoint: a file is missing or cut short.
        Deleted: a running training did, meanwhile.
    """
    with _open(*left) as first, _open(*right) as second:
        for directory, (_, item) in ((first, left), (second, right)):
            if item.entry.managed:
                check_names(directory, Manifest.read(directory))
        a, b = _tensors(first), _tensors(second)
        changed: list[dict[str, Any]] = []
        for name in [name for name in a if name in b]:
            difference = a[name].compare(b[name])
            tick(a[name].size)
            if difference:
                changed.append({"name": name, **difference})
        both = {name for name in a if name in b}
        files_a, files_b = _others(first), _others(second)
        files = [name for name in sorted({*files_a, *files_b}) if not _equal(files_a.get(name), files_b.get(name))]
    result: dict[str, Any] = {
        "a": left[1].plain(),
        "b": right[1].plain(),
        "tensors": sorted(changed, key=lambda item: (not item["name"].startswith("model"), -(item["relative"] or 0))),
        "equal": len(both) - len(changed),
        "only_in_a": sorted(set(a) - set(b)),
        "only_in_b": sorted(set(b) - set(a)),
        "files": files,
        "metrics": differences(left[1].entry.metrics, right[1].entry.metrics),
    }
    old, new = left[1].manifest, right[1].manifest
    if old and new:
        position = [{"step": m.step, "epoch": m.epoch, "resumed_from": m.resumed_from} for m in (old, new)]
        result["position"] = differences(*position)
        result["config"] = differences(old.config, new.config)
        result["environment"] = differences(old.environment, new.environment)
    return result


def export(place: Place, checkpoint: Checkpoint, directory: Path, form: str, part: str, tick: Tick) -> list[str]:
    """Write a checkpoint to an empty directory and return the names of the files.

    Args:
        form: ``files``: all of them, as they are; ``safetensors``: the weights of the state's object ``part``, under
            their own names; ``hf``: what a framework's ``save_pretrained`` wrote.

    Raises:
        CheckpointError: the directory is not empty, or the checkpoint has nothing of that form.
        InvalidCheckpoint: a file is damaged; nothing is written.
        Deleted: a running training did, meanwhile.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is not empty: export to a new directory")
    with _open(place, checkpoint) as source:
        if checkpoint.entry.managed:
            faults = _check(source, Manifest.read(source), tick)
            if faults:
                raise InvalidCheckpoint(f"{checkpoint.entry.where} is damaged and was not exported: {faults[0]}")
        if form == "safetensors":
            weights = _weights(source, part)
            with _whole(directory):
                write_safetensors(weights, directory / "model.safetensors")
            return ["model.safetensors"]
        root, files = (source, _files(source)) if form == "files" else _save_pretrained(source)
        with _whole(directory):
            for path in files:
                target = directory / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        return [str(path.relative_to(root)) for path in files]


@contextmanager
def _whole(directory: Path) -> Generator[None]:
    # half of an export is none
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Planned:
    """What :func:`plan` wants to do with a checkpoint, and why."""

    checkpoint: Checkpoint
    delete: bool
    why: str


def plan(
    place: Place,
    checkpoints: Sequence[Checkpoint],
    *,
    keep_last: int | None = None,
    keep_best: KeepBest | None = None,
    older_than: timedelta | None = None,
    unfinished: bool = False,
    tick: Tick = lambda _: None,
) -> list[Planned]:
    """What to delete. Of each task the newest valid checkpoint and the named ones stay, whatever the rules say.

    Args:
        keep_last, keep_best: as for ``CheckpointManager``; without ``keep_best`` each task's own rule holds.
        older_than: delete only what is older.
        unfinished: do not spare tasks that Metaflow does not know to have finished.
    """
    if keep_best and checkpoints and not keep_best.rank([item.entry for item in checkpoints]):
        there = sorted({name for item in checkpoints for name in item.entry.metrics})
        raise CheckpointError(f"no checkpoint has the metric {keep_best.metric!r}; there are: {', '.join(there)}")
    planned: list[Planned] = []
    for task in dict.fromkeys(item.task for item in checkpoints):
        mine = [item for item in checkpoints if item.task == task]
        if not unfinished and place.running(task):
            planned += [Planned(item, False, "its task has not finished") for item in mine]
            continue
        # plain save() knows no steps and gives every checkpoint a name
        view = [
            dataclasses.replace(item.entry, sequence=number)
            if item.entry.managed
            else dataclasses.replace(item.entry, sequence=number, step=-1 - number, name=None)
            for number, item in enumerate(mine)
        ]
        last = len(mine) if keep_last is None and keep_best is None and older_than is None else keep_last or 1
        best = keep_best or rule_of(place, task)
        doomed = {entry.sequence for entry in to_delete(view, last, best)}
        ranked = {entry.sequence for entry in best.rank(view)[: best.count]} if best else set[int]()
        needed = next((n for n in reversed(range(len(mine))) if _is_valid(place, mine[n], tick)), None)
        for number, item in enumerate(mine):
            delete, why = number in doomed, "by the rules"
            if item.entry.managed and item.entry.name:
                why = "it has a name"
            elif number == needed:
                delete, why = False, "the newest valid one"
            elif best and number in ranked:
                why = f"the best {best.metric}"
            elif delete and older_than and datetime.now(UTC) - item.created < older_than:
                delete, why = False, "not old enough"
            planned.append(Planned(item, delete, why))
    return planned


def rule_of(place: Place, task: str) -> KeepBest | None:
    """The ``keep_best`` that a task's last CheckpointManager was given."""
    rules = [event["keep_best"] for event in place.events.get(task, []) if event.get("keep_best")]
    return KeepBest.parse(rules[-1]) if rules else None


def _is_valid(place: Place, checkpoint: Checkpoint, tick: Tick) -> bool:
    try:
        return not check(place, checkpoint, tick)
    except Deleted:
        return False


def parse_age(text: str) -> timedelta:
    """``90m``, ``12h``, ``7d`` or ``2w`` as a duration. Raises CheckpointError."""
    units = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)([mhdw])", text.strip())
    if not match:
        raise CheckpointError(f"--older-than is {text!r}: write a number and m, h, d or w, such as 12h or 7d")
    return timedelta(**{units[match[2]]: float(match[1])})


def parse_best(text: str) -> KeepBest:
    """``val_loss:min`` or ``accuracy:max``; the direction may be left out where the name tells it."""
    metric, _, mode = text.partition(":")
    if not mode:
        mode = "min" if re.search(r"loss|error|perplexity", metric) else "max" if re.search(r"acc|auc", metric) else ""
    if not metric or mode not in ("min", "max"):
        raise CheckpointError(f"--keep-best is {text!r}: write which is better, such as {metric or 'val_loss'}:min")
    return KeepBest(metric, mode)


_OPTIONS_OF_A_RESUME = ("--with", "--tag", "--max-workers", "--max-num-splits", "--max-log-size", "--run-id-file")


def keep_running(command: list[str]) -> int:
    """Run ``python FLOW.py ... run ...`` and resume it until it succeeds. Returns the last exit status.

    A resumed run has the parameters of the first one, and its options: where it runs, for instance.

    Gives up after three runs in a row in which no task got further: what fails then is not the machine.
    """
    from .metaflow_store import finished_tasks, newest_steps

    verb = next((i for i, word in enumerate(command) if word in ("run", "resume")), None)
    if verb is None or verb == 0:
        raise CheckpointError(f"keep-running needs the command of a flow, such as python flow.py run; got {command}")
    options = _options(command[verb + 1 :])

    def resume(run: str) -> list[str]:
        return [*command[:verb], "resume", "--origin-run-id", run, *options]

    origin, stuck = "", 0
    reached: dict[str, int] = {}
    finished = 0
    with tempfile.TemporaryDirectory() as scratch:
        for count in range(1, sys.maxsize):
            id_file = Path(scratch, str(count))
            line = [*(resume(origin) if origin else command), "--runner-attribute-file", str(id_file)]
            print(f"[keep-running] {shlex.join(line)}", flush=True)
            status, interrupted = _wait_for(line)
            if status == 0:
                print(f"[keep-running] done after {count} run{'s' if count > 1 else ''}", flush=True)
                return 0
            if not id_file.exists():
                print(f"[keep-running] the flow did not start (exit status {status}); giving up", flush=True)
                return status
            started = json.loads(id_file.read_text())
            run, pathspec = started["run_id"], f"{started['flow_name']}/{started['run_id']}"
            if interrupted:
                print(f"[keep-running] interrupted; to go on: keep-running -- {shlex.join(resume(run))}", flush=True)
                return _INTERRUPTED
            steps, done = newest_steps(pathspec), finished_tasks(pathspec)
            further = any(step > reached.get(task, -1) for task, step in steps.items())
            if origin:  # what was done before is taken over, and counts in every run
                further = further or done > finished
            # a run in which nothing got further is not resumed: the one before it is, again
            origin, stuck = (run, 0) if further else (origin or run, stuck + 1)
            reached |= {task: max(step, reached.get(task, -1)) for task, step in steps.items()}
            finished = max(finished, done)
            if stuck == 3:
                newest = max(reached.values(), default=-1)
                print(f"[keep-running] three runs in a row did not get beyond step {newest}; giving up", flush=True)
                return status
            newest = max(steps.values(), default=-1)
            print(f"[keep-running] run {run} failed at a newest checkpoint of step {newest}; resuming", flush=True)
    return 1


_INTERRUPTED = 128 + signal.SIGINT


def _wait_for(line: list[str]) -> tuple[int, bool]:
    """Run a command; its exit status, and whether Ctrl-C was pressed, upon which it still has to save what it has."""
    interrupted = False
    with subprocess.Popen(line) as process:
        while True:
            try:
                return process.wait(), interrupted
            except KeyboardInterrupt:  # the terminal has sent it to all processes
                interrupted = True


def _options(words: list[str]) -> list[str]:
    """Those of Metaflow's ``run`` that its ``resume`` knows, too; what is left out are parameters of the flow."""
    found: list[str] = []
    for place, word in enumerate(words):
        if word in _OPTIONS_OF_A_RESUME:
            found += words[place : place + 2]
        elif word.partition("=")[0] in _OPTIONS_OF_A_RESUME:
            found.append(word)
    return found


# -------------------------------------------------------------------- looking


def _answers_to(checkpoint: Checkpoint, which: str) -> bool:
    entry = checkpoint.entry
    if which.isdigit():
        return entry.step == int(which)
    return not which or which in (entry.name, entry.key, Path(entry.key).name)


def _is_step(path: Path) -> bool:
    return path.is_dir() and bool(re.fullmatch(r"step-[0-9]+(-[0-9]+)?", path.name))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _manifest_of(text: str | None, sizes: Mapping[str, int | None]) -> tuple[Manifest | None, str | None]:
    if text is None:
        return None, f"{FILE_NAME} is missing"
    with tempfile.TemporaryDirectory() as name:
        Path(name, FILE_NAME).write_text(text, encoding="utf-8")
        try:
            manifest = Manifest.read(Path(name))
        except CheckpointError as error:
            return None, str(error)
    return manifest, _fault(manifest, sizes)


def _fault(manifest: Manifest, sizes: Mapping[str, int | None]) -> str | None:
    for name, info in manifest.files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] not in (None, info.size):
            return f"{name}: {sizes[name]} bytes instead of {info.size}"
    return None


def _explain(checkpoints: list[Checkpoint], events: Mapping[str, list[Event]]) -> list[Checkpoint]:
    """The same, each with the reasons why its manager kept it."""
    explained: list[Checkpoint] = []
    for task in dict.fromkeys(item.task for item in checkpoints):
        mine = [item for item in checkpoints if item.task == task]
        starts = [event for event in events.get(task, []) if event["event"] == "started" and "keep_last" in event]
        rule: Event = starts[-1] if starts else {}
        count = int(rule.get("keep_last", 1))
        best = KeepBest(*rule["keep_best"]) if rule.get("keep_best") else None
        ranked = best.rank([item.entry for item in mine])[: best.count] if best else []
        newest = {item.entry.step: item for item in mine if item.entry.managed and not item.fault}
        last = list(newest.values())[-count:]
        for item in mine:
            reasons = [f"best {best.metric}"] if best and item.entry in ranked else []
            if not item.entry.managed:
                reasons.append("plain save()")
            elif item.entry.name:
                reasons.append("named")
            if last and item is last[-1]:
                reasons.insert(0, "newest")
            elif item in last:
                reasons.append(f"last {count}")
            explained.append(dataclasses.replace(item, kept=tuple(reasons)))
    return explained


# -------------------------------------------------------------------- files


def _tensors(directory: Path) -> dict[str, Tensor]:
    """Those of all files; of a framework's files with the file in their name."""
    found: dict[str, Tensor] = {}
    for path in _files(directory):
        if path.suffix == ".safetensors":
            prefix = "" if path.name == TENSORS else f"{path.relative_to(directory)}:"
            found |= {prefix + name: tensor for name, tensor in tensors_of(path).items()}
    return found


def _weights(directory: Path, part: str) -> dict[str, Tensor]:
    if not (directory / TENSORS).is_file():
        raise CheckpointError(
            f"the checkpoint has no {TENSORS}, so no weights of a TrainState: try --format hf, or files"
        )
    tensors = tensors_of(directory / TENSORS)
    weights = {name.removeprefix(f"{part}/"): item for name, item in tensors.items() if name.startswith(f"{part}/")}
    if not weights:
        parts = sorted({name.split("/")[0] for name in tensors})
        raise CheckpointError(f"the state has no tensors of {part!r}; take one of {', '.join(parts)} by --part")
    return weights


def _save_pretrained(directory: Path) -> tuple[Path, list[Path]]:
    """The directory of the checkpoint that ``save_pretrained`` wrote, and its files."""
    for mark in _HUGGING_FACE:
        roots = sorted((path.parent for path in directory.rglob(mark)), key=lambda path: len(path.parts))
        if roots:
            break
    else:
        raise CheckpointError(
            f"the checkpoint has no files of save_pretrained (none of {', '.join(_HUGGING_FACE)}): try --format "
            "safetensors, or files"
        )
    files = [path for path in _files(roots[0]) if path.name not in _OURS and path.suffix not in _PICKLES]
    if not any(path.suffix == ".safetensors" for path in files):
        raise CheckpointError("the checkpoint has its weights as a pickle only, which is not exported: try files")
    return roots[0], files


def _others(directory: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(directory)): path
        for path in _files(directory)
        if path.suffix != ".safetensors" and path.name not in (FILE_NAME, "state.json")
    }


def _equal(a: Path | None, b: Path | None) -> bool:
    if a is None or b is None or a.stat().st_size != b.stat().st_size:
        return False
    return _same_bytes(a, b)


def _same_bytes(a: Path, b: Path) -> bool:
    with open(a, "rb") as first, open(b, "rb") as second:
        while chunk := first.read(8 << 20):
            if chunk != second.read(8 << 20):
                return False
    return True
