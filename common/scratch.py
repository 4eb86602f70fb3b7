"""Working directories that disappear with the process that made them, also after SIGKILL.

Each holds a lock file that its process keeps locked. A directory whose lock can be taken has no owner any more, so
the next process sweeps it; a live writer's directory is never touched. POSIX locks are used because a forked child
(a data loader's worker) does not inherit them.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_LOCK = ".lock"
_own: set[Path] = set()  # a process gets its own POSIX locks again, so it must remember what it holds


class Scratch:
    """A private directory under ``root``. ``directory()`` hands out fresh, empty directories in it."""

    def __init__(self, root: Path) -> None:
        root = root.absolute()  # the training may change its working directory
        sweep(root)
        root.mkdir(parents=True, exist_ok=True)
        # named .new until it is locked, so that no other process can take it for an abandoned one
        made = Path(tempfile.mkdtemp(prefix="scratch-", suffix=".new", dir=root))
        self._fd = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        self.path = made.with_suffix("")
        self._resolved = self.path.resolve()
        _own.add(self._resolved)
        made.rename(self.path)
        self._count = 0

    def directory(self) -> Path:
        """A new, empty directory."""
        self._count += 1
        path = self.path / str(self._count)
        path.mkdir()
        return path

    def remove(self) -> None:
        """Delete everything and give up the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        _own.discard(self._resolved)
        os.close(self._fd)


def sweep(root: Path) -> list[Path]:
    """Remove the scratch directories under ``root`` whose process is dead, and return their paths."""
    swept: list[Path] = []
    for path in root.glob("scratch-*"):
        if path.resolve() in _own:
            continue
        try:
            if path.suffix == ".new" and time.time() - path.stat().st_mtime < 60:
                continue  # being made right now
            fd = os.open(path / _LOCK, os.O_RDWR)
        except OSError:
            continue  # just renamed or removed by its owner
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its owner lives
        else:
            shutil.rmtree(path, ignore_errors=True)
            swept.append(path)
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
    return swept
