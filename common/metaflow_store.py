"""Checkpoints of a Metaflow task, on whatever datastore it uses, through ``metaflow.Checkpoint``.

What this store writes is an ordinary Metaflow checkpoint: ``@model(load=...)``, ``current.checkpoint.load`` and
``Checkpoint().list`` take it. Four things use private parts of metaflow-checkpoint, each with a way back to the
public API and a contract test: a commit without a copy on a local datastore, one client on S3 (s3.py), unique version
numbers, and a listing that survives an unreadable record. They stand together in :class:`_Library`. :class:`Reader`,
for the command line, looks at any task from outside.
"""

import contextlib
import copy
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import metaflow

from .errors import CheckpointError, InvalidCheckpoint
from .events import Event, EventLog, parse
from .manifest import FILE_NAME, Manifest, verify_directory
from .s3 import S3Backend, S3Error, keep_client
from .scratch import Scratch
from .store import Entry, Listing, appender, entry_of, file_name, sync

_UID_VARIABLE = "METAFLOW_CHECKPOINT_UID"
_metaflow = cast("Any", metaflow)  # its type hints know neither `current` nor what extensions add
_checkpoint_class: Any = getattr(_metaflow, "Checkpoint", None)
_current: Any = _metaflow.current


class Task(NamedTuple):
    """Which task this process belongs to, as ``@checkpoint`` tells its children in the environment."""

    flow: str
    run: str
    step: str
    task: str
    identifier: str  # the same in every run, for the same branch of a foreach
    scope: str
    attempt: str

    @classmethod
    def from_environment(cls) -> "Task":
        parts = os.environ.get(_UID_VARIABLE, "").split("/")
        if _checkpoint_class is None or len(parts) != len(cls._fields):
            raise CheckpointError(
                "this is not a task of a step with @checkpoint: decorate the step, or give CheckpointManager a "
                "directory"
            )
        return cls(*parts)

    @property
    def pathspec(self) -> str:
        return "/".join((self.flow, self.run, self.step, self.task))


class MetaflowStore:
    """The checkpoints of the task that this process is, or is a child of."""

    def __init__(self) -> None:
        self.task = Task.from_environment()
        self.where = self.task.pathspec
        if any(type(thread).__name__ == "CheckpointsCollector" for thread in threading.enumerate()):
            raise CheckpointError(
                'write @checkpoint(load_policy="none", show_card=False): the card of @checkpoint lists checkpoints in '
                "a thread that fails when old ones are deleted"
            )
        self._library = _Library(int(self.task.attempt))
        self._work = Scratch(Path(tempfile.gettempdir()) / f"metaflow_checkpoints_{os.getuid()}")
        root = self._library.local_root
        self._staging = Scratch(root / "mf.checkpoints" / "staging") if root else self._work
        self.events = self._event_log()
        self._library.sweep(self.task)

    def _event_log(self) -> EventLog:
        attempt = int(self.task.attempt)
        logs = [f"mf.checkpoints/events/{self.task.pathspec}/{number}.jsonl" for number in range(attempt + 1)]
        texts = self._library.texts(logs)
        earlier = {number: parse(texts[log]) for number, log in enumerate(logs) if log in texts}
        return EventLog(attempt, earlier, self._library.appender(logs[-1], texts.get(logs[-1], "")))

    def stage(self) -> Path:
        return self._staging.directory()

    def work_directory(self) -> Path:
        return self._work.directory()

    def commit(self, staged: Path, manifest: Manifest) -> Entry:
        metadata = {"step": manifest.step, "epoch": manifest.epoch, "sequence": manifest.sequence,
                    "metrics": manifest.metrics, "managed": True, "named": manifest.name is not None}  # fmt: skip
        reference = self._library.save(staged, file_name(manifest), metadata)
        shutil.rmtree(staged, ignore_errors=True)
        return entry_of(manifest, reference["key"], reference, _describe(reference))

    def listing(self) -> Listing:
        records, faults = self._library.records()
        return Listing(entries_of(records), faults)

    def list_other(self, source: str) -> Listing:
        flow, _, run = source.rpartition("/")
        if flow not in ("", self.task.flow) or not run:
            raise CheckpointError(f"resume_from: {source!r} is not a run of {self.task.flow}; write its run id")
        for origin in with_origins(self.task.flow, run):
            records, faults = self._library.search(f"{self.task.flow}/{origin}/{self.task.step}", self.task.identifier)
            if records:
                return Listing(entries_of(records), faults)
        raise CheckpointError(
            f"resume_from: run {run} of {self.task.flow} has no checkpoint of step {self.task.step!r} "
            "that fits this task"
        )

    def origin(self) -> str | None:
        source = _current.origin_run_id if _current.is_running_flow else None
        library, identifier = self._library, self.task.identifier
        return source and continued(
            source, self.task, library.backend, lambda pathspec: library.search(pathspec, identifier)[0]
        )

    def open(self, entry: Entry) -> Path:
        directory = self._work.directory()
        # on a local datastore this makes symlinks into the store; the manager reads through them and hands out copies
        try:
            _load(self._library.backend, entry.reference, directory)
        except Exception as error:
            # a file or a record that is missing or damaged; not an outage or a full disk, which say nothing about it
            if isinstance(error, FileNotFoundError) or type(error).__module__.endswith("utilities.exceptions"):
                raise InvalidCheckpoint(f"it cannot be loaded ({type(error).__name__}: {error})") from error
            raise
        if not (directory / FILE_NAME).exists() and entry.managed:
            raise InvalidCheckpoint(f"{FILE_NAME} is missing")
        return directory

    def verify(self, entry: Entry) -> None:
        if self._library.local_root:  # S3 vouches for what it stores, and a best checkpoint may be gigabytes away
            verify_directory(self.open(entry))

    def delete(self, entry: Entry) -> None:
        _delete(self._library.backend, entry.reference)

    def close(self) -> None:
        if self._staging is not self._work:
            self._staging.remove()
        self._work.remove()


def _load(backend: Any, record: dict[str, Any], directory: Path) -> None:
    if isinstance(backend, S3Backend) and record.get("storage_format") == "files":
        backend.download(record["key"], directory)
    else:
        _checkpoint_class().load(record, path=str(directory))


def _delete(backend: Any, record: dict[str, Any]) -> None:
    if isinstance(backend, S3Backend):
        backend.delete_checkpoint(record)
    else:
        _metaflow.delete_model(record)


def _texts(backend: Any, paths: Sequence[str]) -> dict[str, str]:
    """The contents of small files; one that is missing is left out."""
    texts: dict[str, str] = {}
    with backend.load_bytes(list(paths)) as found:
        for path, file, _ in _pairs(found):
            if file:
                with contextlib.suppress(FileNotFoundError):  # a running task may have deleted it just now
                    texts[path] = Path(file).read_text(encoding="utf-8", errors="replace")
    return texts


def _walk(backend: Any, folders: Sequence[str]) -> dict[str, int | None]:
    """All files in some folders and below, with their sizes in bytes on S3."""
    if isinstance(backend, S3Backend):
        return {**backend.walk(folders)}
    files: dict[str, int | None] = {}
    level = list(folders)
    while level:  # one operation for each level
        found: list[Any] = list(backend.list_content(level))
        files.update((item.path, None) for item in found if item.is_file)
        level = [item.path.rstrip("/") for item in found if not item.is_file]
    return files


def with_origins(flow: str, run: str) -> Iterator[str]:
    """``run``, the run that it resumed, the one that that resumed, and so on."""
    seen: set[str] = set()
    while run not in seen:
        seen.add(run)
        yield run
        try:
            origin = _metaflow.Run(f"{flow}/{run}", _namespace_check=False).origin_pathspec
        except Exception:  # a run that the metadata service does not know has no origin either
            return
        run = (origin or "").rpartition("/")[2]
        if run in ("", "None"):
            return


def continued(source: str, task: Task, backend: Any, search: Callable[[str], list[dict[str, Any]]]) -> str | None:
    """The run that ``task`` of a run that Metaflow's ``resume`` made of ``source`` continues; None: it starts anew.

    ``source``, if it left checkpoints of a step that it had not done, or those that it continued itself. Or a run that
    was resumed from it earlier, and got further: without ``--origin-run-id`` Metaflow resumes the last run that was not
    resumed, again and again. A step that was done is executed again only when somebody asks for it (``resume STEP``),
    mostly with other code, and then from its beginning.
    """
    left, newest = False, -1
    for run in with_origins(task.flow, source):
        records = search(f"{task.flow}/{run}/{task.step}")
        tasks = {record["pathspec"] for record in records}
        if not tasks:
            continue
        left, newest = not any(map(Reader.finished, tasks)), _newest_step(records)
        if left:
            break
        if _current.retry_count == 0:  # a retry of it may have checkpoints of its own
            print(
                f"[checkpoints] run {run} had done step {task.step!r}, which is now executed again, from its "
                f"beginning; to continue from the checkpoints of that run start a new one with --resume-from {run}",
                flush=True,
            )
        return None
    folder = f"mf.checkpoints/resumed/{task.flow}"
    runs = [source]
    for run in runs:
        resumed = [path.rpartition("/")[2] for path in _walk(backend, [f"{folder}/{run}"])] if backend else []
        runs += [other for other in resumed if other not in (*runs, task.run)]
    if backend:
        backend.save_bytes([(f"{folder}/{source}/{task.run}", BytesIO(b"resumed"))], overwrite=True)
    steps = {run: _newest_step(search(f"{task.flow}/{run}/{task.step}")) for run in runs[1:]}
    further = max(steps, key=lambda run: steps[run], default=source)
    if steps.get(further, -1) <= newest:
        return source if left else None
    print(f"[checkpoints] run {further}, resumed from run {source} before, got further: it is continued", flush=True)
    return further


def _newest_step(records: list[dict[str, Any]]) -> int:
    return max((entry.step for entry in entries_of(records)), default=-1)


def newest_steps(pathspec: str) -> dict[str, int]:
    """The largest step that each task of a flow, run or step has saved, by a name that it has in a resumed run, too."""
    found: dict[str, int] = {}
    for entry in entries_of(Reader().records(pathspec)[0]):
        task = entry.key.rpartition("/")[0]
        found[task] = max(found.get(task, -1), entry.step)
    return found


def finished_tasks(run: str) -> int:
    """How many tasks of a run are done, with those that it took over; 0 when the metadata service is out of reach."""
    with contextlib.suppress(Exception):
        return sum(task.finished for step in _metaflow.Run(run, _namespace_check=False) for task in step)
    return 0


class Reader:
    """The checkpoints of any task on the configured datastore, seen from outside of it.

    Reads in bulk, because each operation on an object store has to wait for its answer.

    Args:
        rounds: how often to try again when S3 does not answer; not at all where someone waits at the terminal. As for
            :func:`~.s3.keep_client`.

    Raises:
        CheckpointError: there is no datastore.
    """

    def __init__(self, rounds: int | None = 0) -> None:
        if _checkpoint_class is None:
            raise CheckpointError("metaflow-checkpoint is not installed: pip install metaflow-checkpoint")
        config: Any = import_module("metaflow.metaflow_config")
        if config.DEFAULT_DATASTORE == "local":
            local: Any = import_module("metaflow.plugins.datastores.local_storage").LocalStorage
            root = local.get_datastore_root_from_config(print, create_on_absent=False)
            if root is None or not Path(root).is_dir():
                raise CheckpointError(
                    f"there is no Metaflow datastore at {root or Path.cwd()}: go to where the flow ran, or set "
                    "METAFLOW_DATASTORE_SYSROOT_LOCAL or METAFLOW_DEFAULT_DATASTORE as it was set there"
                )
        tasks = "metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastore.task_utils"
        self.backend: Any = keep_client(import_module(tasks).init_datastorage_object(), rounds)
        self.where = str(self.backend.datastore_root)

    def records(self, pathspec: str = "") -> tuple[list[dict[str, Any]], dict[str, list[Event]], list[str]]:
        """The records of a flow, run, step or task ("": of all), the events of their tasks, and the faults met."""
        roots = [f"mf.checkpoints/{part}/{pathspec}".rstrip("/") for part in ("checkpoints/metadata", "events")]
        texts = self.texts([path for path in self.walk(roots) if path.endswith((".metadata", ".jsonl"))])
        events: dict[str, list[Event]] = {}
        for path in sorted((path for path in texts if path.endswith(".jsonl")), key=_attempt):
            task = path.removeprefix("mf.checkpoints/events/").rpartition("/")[0]
            events.setdefault(task, []).extend(parse(texts.pop(path)))
        records, faults = _parse_records(texts)
        return records, events, faults

    def record(self, key: str) -> dict[str, Any]:
        """The record of the checkpoint with this key. Raises CheckpointError when there is none."""
        try:
            return json.loads(self.texts([_record_of(key)])[_record_of(key)])
        except (KeyError, ValueError):
            raise CheckpointError(f"there is no checkpoint with the key {key} in {self.where}") from None

    def deleted(self, keys: Sequence[str], wait: float = 0) -> set[str]:
        """Those of some checkpoints that have been deleted; one that is being deleted has ``wait`` seconds to be so.

        The library deletes the files first and the record then.
        """
        deadline = time.monotonic() + wait
        while True:
            records = self.texts([_record_of(key) for key in keys])
            gone = {key for key in keys if _record_of(key) not in records}
            if len(gone) == len(keys) or time.monotonic() > deadline:
                return gone
            time.sleep(0.05)

    def files(self, keys: Sequence[str]) -> dict[str, dict[str, int | None]]:
        """The names of the files of each checkpoint, with their sizes where the datastore tells them."""
        found: dict[str, dict[str, int | None]] = {key: {} for key in keys}
        local = self.backend.TYPE == "local"
        for path, size in _walk(self.backend, keys).items():
            key = next((key for key in (path.rsplit("/", n)[0] for n in range(1, path.count("/"))) if key in found), "")
            if key:
                found[key][path.removeprefix(f"{key}/")] = self.backend.size_file(path) if local else size
        return found

    def texts(self, paths: Sequence[str]) -> dict[str, str]:
        """The contents of small files; one that is missing is left out."""
        return _texts(self.backend, paths)

    def walk(self, folders: Sequence[str]) -> list[str]:
        """The paths of all files in some folders and below."""
        return list(_walk(self.backend, folders))

    def load(self, record: dict[str, Any], directory: Path) -> None:
        """Put a checkpoint's files, or symlinks to them, into ``directory``."""
        _load(self.backend, record, directory)

    def delete(self, record: dict[str, Any]) -> None:
        """Delete a checkpoint."""
        _delete(self.backend, record)

    @staticmethod
    def finished(pathspec: str) -> bool:
        """Whether the metadata service knows that the task ended well; one that was killed never does."""
        try:
            return bool(_metaflow.Task(pathspec, _namespace_check=False).finished)
        except Exception:  # unknown there
            return False


def _parse_records(texts: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    records: list[dict[str, Any]] = []
    faults: list[str] = []
    for path in sorted(texts, key=_attempt):
        try:
            record: Any = json.loads(texts[path])
        except ValueError:
            record = None
        if _is_record(record):
            records.append(record)
        else:
            faults.append(f"the record {path} is unreadable")
    return records, faults


def _is_record(record: Any) -> bool:
    # a flipped bit may leave JSON that is no record any more
    try:
        datetime.fromisoformat(record["created_on"])
        (entry,) = entries_of([record])
        numbers = [int(record["attempt"]), *([entry.step, entry.sequence] if entry.managed else [])]
        texts = [record["pathspec"], record["key"], record["url"]]
        return (
            record["type"] == "checkpoint"
            and record.get("storage_format", "files") in ("files", "tar")
            and all(type(number) is int for number in numbers)
            and all(isinstance(text, str) for text in texts)
            and isinstance(cast("object", entry.metrics), dict)
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _record_of(key: str) -> str:
    return f"{key.replace('/artifacts/', '/artifact_metadata/', 1)}.metadata"


def _attempt(path: str) -> tuple[str, int]:
    folder, _, name = path.rpartition("/")
    number = name.partition(".")[0]
    return folder, int(number) if number.isdigit() else -1


def entries_of(records: list[dict[str, Any]]) -> list[Entry]:
    """The entries of some records, oldest first."""
    entries: list[Entry] = []
    for record in records:
        metadata: dict[str, Any] = record.get("metadata") or {}
        if not metadata.get("managed"):
            entries.append(Entry(record["key"], record, _describe(record), managed=False, name=record.get("name")))
            continue
        entries.append(
            Entry(
                record["key"],
                record,
                _describe(record),
                metadata["step"],
                metadata["epoch"],
                metadata["sequence"],
                metadata["metrics"],
                record["name"] if metadata["named"] else None,
            )
        )
    return sorted(entries, key=lambda entry: entry.sequence)


def _describe(record: dict[str, Any]) -> str:
    return f"{record['pathspec']} attempt {record['attempt']} {record['name']}"


class _Library:
    """The touch points with metaflow-checkpoint that its public API does not cover.

    ``private`` is None when a version of the library has moved these parts; everything then takes the public way.
    """

    def __init__(self, attempt: int) -> None:
        self._saver = _checkpoint_class()
        self._version = 0
        self.private: Any = self._private_parts(attempt)
        self.backend: Any = keep_client(self.private.artifact_store._backend) if self.private else None
        self.local_root = (
            Path(self.backend.datastore_root).resolve() if self.private and self.backend.TYPE == "local" else None
        )
        # a backend of our own, so that the user's current.checkpoint.save() keeps the library's way
        if self.local_root:
            renaming = copy.copy(self.backend)
            renaming.save_files = self._rename_into_store
            self.private.artifact_store._backend = renaming
        if isinstance(self.backend, S3Backend):
            for part in (self.private.artifact_store, self.private.metadata_store, self.private.artifact_metadatastore):
                part._backend = self.backend

    def _private_parts(self, attempt: int) -> Any:
        """The library's own store object, or None when it is not what this module knows."""
        try:
            cast("Any", type(self._saver))._init_checkpoint_for_writes(self._saver)
            checkpointer = self._saver._checkpointer
            checkpointer._attempt = attempt  # read from the environment it is a string, in a task a number
            store = checkpointer._checkpoint_datastore
            for part in (store.artifact_store, store.metadata_store, store.artifact_metadatastore):
                _ = part.list_paths, part._load_metadata, part.FULL_PREFIX, part._backend.save_files
            self._set_version = checkpointer._set_current_version
        except Exception:
            return None
        return store

    def _rename_into_store(self, key_path_tuples: Any, overwrite: bool = False) -> None:
        # the manifest last, as everywhere; only files in our own staging directory come here
        folders: set[Path] = set()
        for key, path in sorted(key_path_tuples, key=lambda pair: os.path.basename(pair[1]) == FILE_NAME):
            target = Path(self.backend.full_uri(key))
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)
            os.chmod(path, 0o444)  # @model(load=) hands out symlinks: nobody should write through them by accident
            try:
                os.rename(path, target)
            except OSError:  # another file system
                shutil.copy(path, target)
        for folder in folders:
            sync(folder)

    def save(self, staged: Path, name: str, metadata: dict[str, Any]) -> dict[str, Any]:
        """Save through the library, under a key that no other process, thread or attempt can have."""
        # microseconds: also what makes Checkpoint().list(), which sorts by version, put the newest first
        self._version = max(self._version + 1, time.time_ns() // 1000)
        if self.private:
            self._set_version(self._version)
        else:
            name = f"{name}-{self._version}"
        record = self._saver.save(path=str(staged), name=name, metadata=metadata)
        if self.local_root:  # what comes next is the deletion of older ones
            task = "mf.checkpoints/checkpoints/metadata/" + record["pathspec"]
            name = f"{record['attempt']}.{record['name']}.{record['version_id']}.metadata"
            for path in (self.local_root / _record_of(record["key"]), self.local_root / task / name):
                for part in (path, path.parent):
                    with contextlib.suppress(FileNotFoundError):  # another version of the library keeps it elsewhere
                        sync(part)
        return record

    def records(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The records of the task, of all attempts, and the faults met."""
        if not self.private:
            return self._saver.list(), []
        records, faults = _parse_records(self._read(self.private.metadata_store.FULL_PREFIX))
        return self._list_and_mend() if faults else (records, self._check_latest())

    def _read(self, folder: str) -> dict[str, str]:
        # all at once, where the library reads one after the other; and of a run that lives some are gone meanwhile
        paths = [path for path in _walk(self.backend, [folder]) if path.endswith(".metadata")]
        return _texts(self.backend, paths)

    def _list_and_mend(self) -> tuple[list[dict[str, Any]], list[str]]:
        # each record is stored twice; one that is unreadable makes list() raise for ever and a finished step fail,
        # so it is written anew from its twin, or removed when both are lost
        store, faults = self.private, self._check_latest()
        records: list[dict[str, Any]] = []
        for path in list(store.metadata_store.list_paths([""])):
            key = os.path.basename(path.key)
            if not key.endswith(".metadata"):
                continue
            with contextlib.suppress(ValueError):
                record = store.metadata_store._load_metadata(key)
                if _is_record(record):
                    records.append(record)
                    continue
            try:
                twin = store.artifact_metadatastore._load_metadata(f"{store._NAME_ENTROPY}.{key}")
                if not _is_record(twin):
                    raise ValueError("it is none")
                store.metadata_store._save_metadata(key, twin)
                records.append(twin)
                faults.append(f"record {key} was unreadable and is mended from its copy")
            except S3Error:
                raise  # that it could not be asked for says nothing about it
            except Exception:
                store.metadata_store.delete(key)
                faults.append(f"record {key} and its copy were unreadable; removed")
        return records, faults

    def _check_latest(self) -> list[str]:
        if not self.private:
            return []
        try:
            self.private.metadata_store._load_metadata("latest")
        except ValueError:
            return ["the pointer 'latest' is unreadable; the list of checkpoints is used instead"]
        except Exception:
            return []  # nothing saved yet
        return []

    def search(self, pathspec: str, identifier: str) -> tuple[list[dict[str, Any]], list[str]]:
        """The records of another run's step, for the same branch of a foreach, and the faults met."""
        if self.private:
            root = self.private.metadata_store.FULL_PREFIX.removesuffix(self.private.pathspec)
            records, faults = _parse_records(self._read(f"{root}{pathspec}"))
        else:
            found: list[dict[str, Any]] = self._saver.list(full_namespace=True)
            records, faults = [record for record in found if record["pathspec"].startswith(f"{pathspec}/")], []
        return [record for record in records if f"/{identifier}/" in record["key"]], faults

    def sweep(self, task: Task) -> None:
        """Remove what a killed earlier attempt left half-written: files without a record."""
        if not self.private or int(task.attempt) == 0:
            return
        store = self.private
        known = {os.path.basename(path.key) for path in store.metadata_store.list_paths([""])}
        for path in list(store.artifact_store.list_paths([""])):
            entropy, attempt, *rest = os.path.basename(path.key.rstrip("/")).split(".")
            if entropy != store._NAME_ENTROPY or not attempt.isdigit() or int(attempt) >= int(task.attempt):
                continue
            if ".".join([attempt, *rest, "metadata"]) not in known:
                store.artifact_store.delete_prefix(os.path.basename(path.key.rstrip("/")))

    def texts(self, paths: Sequence[str]) -> dict[str, str]:
        """The contents of small files of the datastore; one that is missing is left out."""
        return _texts(self.backend, paths) if self.backend else {}

    def appender(self, key: str, before: str) -> Callable[[str], None]:
        """A function that appends to a small text in the datastore, which has ``before`` in it."""
        if self.local_root:
            path = self.local_root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            return appender(path)
        lines = [before]

        def append(text: str) -> None:
            lines.append(text)
            if self.backend:  # an object store cannot append
                self.backend.save_bytes([(key, BytesIO("".join(lines).encode()))], overwrite=True)

        return append


def _pairs(found: Any) -> Iterator[tuple[str, str | None, Any]]:
    yield from found
