"""Checkpoints of a Metaflow task, on whatever datastore it uses, through ``metaflow.Checkpoint``.

What this store writes is an ordinary Metaflow checkpoint: ``@model(load=...)``, ``current.checkpoint.load`` and
``Checkpoint().list`` take it. Four things use private parts of metaflow-checkpoint, each with a way back to the
public API and a contract test: a commit without a copy on a local datastore, one client on S3 (s3.py), unique version
numbers, and a listing that survives an unreadable record. They stand together in :class:`_Library`. :class:`Reader`,
for the command line, looks at any task from outside.
"""

import copy
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import metaflow

from .errors import CheckpointError, InvalidCheckpoint
from .events import Event, EventLog, parse
from .manifest import FILE_NAME, Manifest
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
        for origin in _with_origins(self.task.flow, run):
            records = self._library.search(f"{self.task.flow}/{origin}/{self.task.step}", self.task.identifier)
            if records:
                return Listing(entries_of(records))
        raise CheckpointError(
            f"resume_from: run {run} of {self.task.flow} has no checkpoint of step {self.task.step!r} "
            "that fits this task"
        )

    def origin(self) -> str | None:
        return _current.origin_run_id if _current.is_running_flow else None

    def open(self, entry: Entry) -> Path:
        directory = self._work.directory()
        # on a local datastore this makes symlinks into the store; the manager reads through them and hands out copies
        _load(self._library.backend, entry.reference, directory)
        if not (directory / FILE_NAME).exists() and entry.managed:
            raise InvalidCheckpoint(f"{FILE_NAME} is missing")
        return directory

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


def _with_origins(flow: str, run: str) -> Iterator[str]:
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


def newest_step(pathspec: str) -> int:
    """The largest step among the checkpoints of a flow, run, step or task; -1 when there is none."""
    found = _checkpoint_class()._search(pathspec=pathspec)
    return max((entry.step for entry in entries_of(list(found))), default=-1)


class Reader:
    """The checkpoints of any task on the configured datastore, seen from outside of it.

    Reads in bulk, because each operation on an object store has to wait for its answer.

    Raises:
        CheckpointError: there is no datastore.
    """

    def __init__(self) -> None:
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
        # someone waits at the terminal: no more patience than the client itself has
        self._backend: Any = keep_client(import_module(tasks).init_datastorage_object(), rounds=0)
        self.where = str(self._backend.datastore_root)
        _metaflow.namespace(None)  # everybody's runs

    def records(self, pathspec: str = "") -> tuple[list[dict[str, Any]], dict[str, list[Event]], list[str]]:
        """The records of a flow, run, step or task ("": of all), the events of their tasks, and the faults met."""
        roots = [f"mf.checkpoints/{part}/{pathspec}".rstrip("/") for part in ("checkpoints/metadata", "events")]
        files = [path for path in self.walk(roots) if path.endswith((".metadata", ".jsonl"))]
        records: list[dict[str, Any]] = []
        events: dict[str, list[Event]] = {}
        faults: list[str] = []
        for path, text in sorted(self.texts(files).items(), key=lambda item: _attempt(item[0])):
            if path.endswith(".jsonl"):
                task = path.removeprefix("mf.checkpoints/events/").rpartition("/")[0]
                events.setdefault(task, []).extend(parse(text))
                continue
            try:
                records.append(json.loads(text))
            except ValueError:
                faults.append(f"the record {path} is unreadable")
        return records, events, faults

    def record(self, key: str) -> dict[str, Any]:
        """The record of the checkpoint with this key. Raises CheckpointError when there is none."""
        path = f"{key.replace('/artifacts/', '/artifact_metadata/', 1)}.metadata"
        try:
            return json.loads(self.texts([path])[path])
        except (KeyError, ValueError):
            raise CheckpointError(f"there is no checkpoint with the key {key} in {self.where}") from None

    def files(self, keys: Sequence[str]) -> dict[str, dict[str, int | None]]:
        """The names of the files of each checkpoint, with their sizes where the datastore tells them."""
        found: dict[str, dict[str, int | None]] = {key: {} for key in keys}
        local = self._backend.TYPE == "local"
        for path, size in _walk(self._backend, keys).items():
            key = next((key for key in (path.rsplit("/", n)[0] for n in range(1, path.count("/"))) if key in found), "")
            if key:
                found[key][path.removeprefix(f"{key}/")] = self._backend.size_file(path) if local else size
        return found

    def texts(self, paths: Sequence[str]) -> dict[str, str]:
        """The contents of small files; one that is missing is left out."""
        return _texts(self._backend, paths)

    def walk(self, folders: Sequence[str]) -> list[str]:
        """The paths of all files in some folders and below."""
        return list(_walk(self._backend, folders))

    def load(self, record: dict[str, Any], directory: Path) -> None:
        """Put a checkpoint's files, or symlinks to them, into ``directory``."""
        _load(self._backend, record, directory)

    def delete(self, record: dict[str, Any]) -> None:
        """Delete a checkpoint."""
        _delete(self._backend, record)

    @staticmethod
    def finished(pathspec: str) -> bool:
        """Whether the metadata service knows that the task ended well; one that was killed never does."""
        try:
            return bool(_metaflow.Task(pathspec).finished)
        except Exception:  # unknown there
            return False


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
        return self._saver.save(path=str(staged), name=name, metadata=metadata)

    def records(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The records of the task, of all attempts, and the faults met."""
        try:
            records: list[dict[str, Any]] = (
                self._read(self.private.metadata_store.FULL_PREFIX)
                if isinstance(self.backend, S3Backend)
                else self._saver.list()
            )
        except Exception:
            if not self.private:
                raise
            return self._list_and_mend()
        return records, self._check_latest()

    def _read(self, folder: str) -> list[dict[str, Any]]:
        # all at once, where the library reads one after the other
        paths = [path for path in _walk(self.backend, [folder]) if path.endswith(".metadata")]
        return [json.loads(text) for text in _texts(self.backend, paths).values()]

    def _list_and_mend(self) -> tuple[list[dict[str, Any]], list[str]]:
        # each record is stored twice; one that is unreadable makes list() raise for ever and a finished step fail,
        # so it is written anew from its twin, or removed when both are lost
        store, faults = self.private, self._check_latest()
        records: list[dict[str, Any]] = []
        for path in list(store.metadata_store.list_paths([""])):
            key = os.path.basename(path.key)
            if not key.endswith(".metadata"):
                continue
            try:
                records.append(store.metadata_store._load_metadata(key))
                continue
            except ValueError:
                pass
            try:
                twin = store.artifact_metadatastore._load_metadata(f"{store._NAME_ENTROPY}.{key}")
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

    def search(self, pathspec: str, identifier: str) -> list[dict[str, Any]]:
        """The records of another run's step, for the same branch of a foreach."""
        try:
            if isinstance(self.backend, S3Backend):
                root = self.private.metadata_store.FULL_PREFIX.removesuffix(self.private.pathspec)
                records = self._read(f"{root}{pathspec}")
            else:
                records = list(_checkpoint_class()._search(pathspec=pathspec))
        except AttributeError:
            found: list[dict[str, Any]] = self._saver.list(full_namespace=True)
            records = [record for record in found if record["pathspec"].startswith(f"{pathspec}/")]
        return [record for record in records if f"/{identifier}/" in record["key"]]

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
            from io import BytesIO

            lines.append(text)
            if self.backend:  # an object store cannot append
                self.backend.save_bytes([(key, BytesIO("".join(lines).encode()))], overwrite=True)

        return append


def _pairs(found: Any) -> Iterator[tuple[str, str | None, Any]]:
    yield from found
