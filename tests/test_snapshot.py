"""The file that a snapshot writes: any safetensors reader opens it, past the page cache or not."""

import errno
import fcntl
import os

import numpy as np
import pytest
import xxhash

from common.encoding import encode
from common.snapshot import Snapshot

LARGE = 8 << 20
DIRECT = getattr(os, "O_DIRECT", 0)
SIZES = [0, 1, 4095, 4096, LARGE - 1, LARGE, LARGE + 1, LARGE + 4095, 2 * LARGE + 4096, 2 * LARGE + 5000]


def written(path, size):
    """A snapshot of ``size`` bytes in two arrays, written to ``path``."""
    numbers = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    snapshot = Snapshot()
    snapshot.take(encode({"first": numbers[: size // 3], "second": numbers[size // 3 :]})[1])
    path.unlink(missing_ok=True)
    length, digest = snapshot.write(path)
    content = path.read_bytes()
    assert (length, digest) == (len(content), xxhash.xxh3_128(content).hexdigest())
    assert content.endswith(numbers.tobytes()) and length <= size + 4096 + 200
    return numbers


class Writes:
    """Sees every write, and whether it goes past the page cache; may refuse it."""

    def __init__(self, monkeypatch, refuse=0):
        self.direct, self.cached, self._write = [], [], os.write
        self._refuse = refuse
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd, data):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT:
            if self._refuse:
                raise OSError(self._refuse, os.strerror(self._refuse))
            self.direct.append(len(data))
            return self._write(fd, data)
        self.cached.append(len(data))
        return self._write(fd, data)


def takes_direct_writes(directory) -> bool:
    if not DIRECT:
        return False
    try:
        os.close(os.open(directory / "probe", os.O_CREAT | os.O_WRONLY | DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("size", SIZES)
def test_safetensors_reads_it(tmp_path, size):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the environment has no safetensors")
    numbers = written(tmp_path / "file", size)
    arrays = safetensors.load_file(tmp_path / "file")
    assert np.array_equal(np.concatenate([arrays["first"], arrays["second"]]), numbers)


def test_only_large_states_go_past_the_page_cache(tmp_path, monkeypatch):
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system knows no direct writes")
    writes = Writes(monkeypatch)
    written(tmp_path / "file", LARGE - 1)
    assert not writes.direct
    written(tmp_path / "file", 2 * LARGE + 5000)
    assert sum(writes.direct) == 2 * LARGE + 4096, "all whole blocks"
    assert writes.cached[-1] == 5000 - 4096


@pytest.mark.parametrize("size", SIZES)
def test_a_file_system_that_knows_no_direct_writes(tmp_path, monkeypatch, size):
    real = fcntl.fcntl

    def refuse(fd, command, *arguments):
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    written(tmp_path / "file", size)


@pytest.mark.parametrize("size", SIZES)
def test_a_file_system_that_wants_larger_blocks(tmp_path, monkeypatch, size):
    writes = Writes(monkeypatch, refuse=errno.EINVAL)
    written(tmp_path / "file", size)
    assert not writes.direct


def test_a_write_that_stops_within_a_block(tmp_path, monkeypatch):
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system knows no direct writes")
    real, stopped = os.write, []

    def write(fd, data):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT:
            if len(data) % 4096:  # what the kernel answers when the rest begins within a block
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~DIRECT)
            count = real(fd, data[:1000])
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | DIRECT)
            stopped.append(count)
            return count
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    written(tmp_path / "file", 2 * LARGE)
    assert stopped


def test_a_disk_error_is_no_reason_to_try_again(tmp_path, monkeypatch):
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system knows no direct writes")
    Writes(monkeypatch, refuse=errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        written(tmp_path / "file", LARGE)
