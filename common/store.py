"""Where checkpoints live. A store commits a finished directory as a whole, lists, reads and deletes."""

import errno
import fcntl
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from .errors import CheckpointError, InvalidCheckpoint
from .events import Event, EventLog, parse
from .manifest import Manifest, verify_directory
from .scratch import Scratch


@dataclass(frozen=True)
class Entry:
    """One checkpoint in a store.

    Attributes:
        key: its name in the store.
        reference: what the store's own API loads: a dict for Metaflow, a path for a directory.
        where: for messages.
        step, epoch, sequence, metrics, name: as in its manifest.
        managed: False for a checkpoint without a manifest, such as one that plain ``save()`` wrote.
    """

    key: str
    reference: Any
    where: str
    step: int = -1
    epoch: int | None = None
    sequence: int = -1
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    name: str | None = None
    managed: bool = True


@dataclass(frozen=True)
class Listing:
    """The checkpoints of a task, oldest first, and what in the store could not be read."""

    entries: list[Entry]
    faults: list[str] = field(default_factory=list[str])


class Store(Protocol):
    """What the manager needs of a place for checkpoints."""

    where: str
    events: EventLog

    def stage(self) -> Path:
        """A fresh directory for a checkpoint in the making."""
        ...

    def work_directory(self) -> Path:
        """A fresh directory for the user's own files, gone when the process ends."""
        ...

    def commit(self, staged: Path, manifest: Manifest) -> Entry:
        """Make a complete staged directory a checkpoint, at once and as a whole."""
        ...

    def listing(self) -> Listing:
        """The checkpoints of this task, of all attempts."""
        ...

    def list_other(self, source: str) -> Listing:
        """The checkpoints of another run (or directory) that continue here. Raises CheckpointError when unknown."""
        ...

    def origin(self) -> str | None:
        """The run that this one resumes on the runner's own initiative (Metaflow's ``resume``), if any."""
        ...

    def open(self, entry: Entry) -> Path:
        """A directory with the checkpoint's files, to be read only."""
        ...

    def verify(self, entry: Entry) -> None:
        """Raise InvalidCheckpoint when the files are damaged. A store that would have to download them does nothing."""
        ...

    def delete(self, entry: Entry) -> None: ...

    def close(self) -> None:
        """Remove what is temporary."""
        ...


def entry_of(manifest: Manifest, key: str, reference: Any, where: str) -> Entry:
    """The entry of a checkpoint whose manifest is known."""
    return Entry(
        key, reference, where, manifest.step, manifest.epoch, manifest.sequence, manifest.metrics, manifest.name
    )


def file_name(about: "Manifest | Entry") -> str:
    """The name of a checkpoint: the user's, or ``step-00000012``."""
    return about.name or f"step-{about.step:08d}"


class DirectoryStore:
    """Checkpoints as sub-directories of one directory, without Metaflow. One process may write at a time.

    Raises CheckpointError when the directory cannot be made or written, or another process is using it.
    """

    def __init__(self, directory: str | os.PathLike[str], *, fresh: bool = False) -> None:
        self.directory = Path(directory).absolute()  # the training may change its working directory
        self.where = str(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self.directory}: {error.strerror or error}. Choose another directory."
            ) from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise CheckpointError(
                f"another process is writing checkpoints to {self.directory}: wait for it, or choose another directory"
            ) from None
        self._scratch = Scratch(self.directory / ".staging")
        if fresh:
            for path in [*self.directory.glob("*/manifest.json"), *self.directory.glob("step-*/")]:
                shutil.rmtree(path.parent if path.name == "manifest.json" else path, ignore_errors=True)
            shutil.rmtree(self.directory / "events", ignore_errors=True)
        self.events = self._event_log()

    def _event_log(self) -> EventLog:
        folder = self.directory / "events"
        folder.mkdir(exist_ok=True)
        earlier: dict[int, list[Event]] = {}
        for path in folder.glob("*.jsonl"):
            if path.stem.isdigit():
                earlier[int(path.stem)] = parse(path.read_text(encoding="utf-8", errors="replace"))
        attempt = max(earlier, default=-1) + 1
        return EventLog(attempt, earlier, appender(folder / f"{attempt}.jsonl"))

    def stage(self) -> Path:
        return self._scratch.directory()

    def work_directory(self) -> Path:
        return self._scratch.directory()

    def commit(self, staged: Path, manifest: Manifest) -> Entry:
        name = file_name(manifest)
        target, count = self.directory / name, 1
        while target.exists():  # trained a second time after the first was found damaged
            count += 1
            target = self.directory / f"{name}-{count}"
        sync(staged)
        staged.rename(target)
        sync(self.directory)
        return entry_of(manifest, target.name, str(target), str(Path(self.where, target.name)))

    def listing(self) -> Listing:
        found = _list_directory(self.directory, self.where)
        # a copy that somebody made beside them is neither to be restored nor to be deleted
        own = [entry for entry in found.entries if re.fullmatch(rf"{file_name(entry)}(-[0-9]+)?", entry.key)]
        return Listing(own, found.faults)

    def list_other(self, source: str) -> Listing:
        if not Path(source).is_dir():
            raise CheckpointError(f"resume_from: there is no directory {source}")
        return _list_directory(Path(source).absolute(), source)

    def origin(self) -> str | None:
        return None

    def open(self, entry: Entry) -> Path:
        return Path(entry.reference)

    def verify(self, entry: Entry) -> None:
        verify_directory(self.open(entry))

    def delete(self, entry: Entry) -> None:
        doomed = self._scratch.directory() / "deleted"
        Path(entry.reference).rename(doomed)  # it is gone at once and as a whole; a kill leaves a swept directory
        shutil.rmtree(doomed)

    def close(self) -> None:
        self._scratch.remove()
        os.close(self._lock)


def _list_directory(directory: Path, where: str) -> Listing:
    entries: list[Entry] = []
    faults: list[str] = []
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name == "events" or path.is_symlink() or not path.is_dir():
            continue
        try:
            manifest = Manifest.read(path)
        except InvalidCheckpoint as error:
            faults.append(f"{path.name}: {error}")
            continue
        entries.append(entry_of(manifest, path.name, str(path), str(Path(where, path.name))))
    return Listing(sorted(entries, key=lambda entry: entry.sequence), faults)


def appender(path: Path) -> Any:
    """A function that appends text to a file and returns when it is stored."""

    def append(text: str) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    return append


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_name(name: str) -> str:
    """Raise CheckpointError for a checkpoint name that the store could not list or load."""
    if not isinstance(cast("object", name), str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise CheckpointError(
            f"{name!r} cannot be the name of a checkpoint: use 1 to 100 letters, digits, '_' and '-' (a dot could not "
            "be loaded again, a slash would leave the store)"
        )
    if re.fullmatch(r"events|step-[0-9]+(-[0-9]+)?", name):
        raise CheckpointError(f"{name!r} is a name that the checkpoint layer uses itself; choose another")
    return name
