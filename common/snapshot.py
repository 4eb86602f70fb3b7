"""A point-in-time copy of arrays in one reused buffer, laid out as a safetensors file.

The buffer *is* the file's data section, so writing a checkpoint is one sequential write with a hash running over
it. The layout is the public safetensors format (an 8-byte length, a JSON header, the data), so that any
safetensors reader opens the file: https://github.com/huggingface/safetensors#format
"""

import ctypes
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .encoding import NUMPY_OF, TORCH_OF, Array
from .errors import InvalidCheckpoint

_CHUNK = 8 << 20
_ITEMSIZE = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
             "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip


class Snapshot:
    """One buffer that holds the arrays of the last :meth:`take`; reused, because fresh memory is slow to touch."""

    def __init__(self) -> None:
        self._buffer = _memory(0)
        self._header = b""
        self._size = 0

    @property
    def nbytes(self) -> int:
        """Bytes of array data held."""
        return self._size

    def reserve(self, size: int) -> None:
        """Have ``size`` bytes ready, touched: the first copy into fresh memory takes many times as long."""
        if size > self._buffer.nbytes:
            self._buffer = _memory(size)
            self._buffer.fill(0)

    def take(self, arrays: Mapping[str, Array]) -> None:
        """Copy every array. Runs on the training thread; when it returns the arrays may change."""
        # widest first, as the safetensors library does, so that every tensor is aligned to its item size
        order = sorted(arrays, key=lambda name: -_ITEMSIZE[arrays[name].dtype])
        size = sum(arrays[name].nbytes for name in order)
        if size > self._buffer.nbytes:
            self._buffer = _memory(size)
        header: dict[str, Any] = {}
        offset, base = 0, self._buffer.ctypes.data
        for name in order:
            array = arrays[name]
            if array.nbytes:
                array.copy_to(base + offset)
            header[name] = {
                "dtype": array.dtype,
                "shape": list(array.shape),
                "data_offsets": [offset, offset + array.nbytes],
            }
            offset += array.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._size = size

    def write(self, path: Path) -> tuple[int, str]:
        """Write the snapshot to ``path``, durably. Returns its size in bytes and its xxh3_128 hash."""
        digest = xxhash.xxh3_128(self._header)
        data = memoryview(self._buffer)[: self._size]
        with open(path, "xb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(self._header))
            for start in range(0, self._size, _CHUNK):
                chunk = data[start : start + _CHUNK]
                digest.update(chunk)
                _write_all(file.fileno(), chunk)
            os.fsync(file.fileno())
        return len(self._header) + self._size, digest.hexdigest()


def _memory(size: int) -> Any:
    # numpy's type hints have the buffer protocol from Python 3.12 on only, hence Any
    return np.empty(size, np.uint8)


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(fd, data) :]


class StateFile:
    """A safetensors file read into private memory, hashed while it is there."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            self._data = _memory(os.fstat(file.fileno()).st_size)
            view, filled = memoryview(self._data), 0
            while filled < len(view):
                count = file.readinto(view[filled:])
                if not count:
                    raise InvalidCheckpoint(f"{path.name}: ended after {filled} of {len(view)} bytes")
                filled += count
        self.size = filled
        self.xxh3_128 = xxhash.xxh3_128(self._data).hexdigest()
        self._name = path.name
        self._header: dict[str, Any] | None = None

    def tensor(self, name: str) -> Any:
        """The array ``name`` as a torch tensor in memory of its own."""
        import torch

        dtype, shape, address, nbytes = self._locate(name)
        # allocated by torch, as in a run that was never interrupted: a kernel may depend on the alignment
        tensor: Any = torch.empty(shape, dtype=getattr(torch, TORCH_OF[dtype]))
        ctypes.memmove(tensor.data_ptr(), address, nbytes)
        return tensor

    def array(self, name: str) -> Any:
        """The array ``name`` as a numpy array in memory of its own."""
        dtype, shape, address, nbytes = self._locate(name)
        array: Any = np.empty(shape, NUMPY_OF[dtype])
        ctypes.memmove(array.ctypes.data, address, nbytes)
        return array

    def _locate(self, name: str) -> tuple[str, list[int], int, int]:
        header = self._header
        if header is None:
            length = int.from_bytes(self._data[:8].tobytes(), "little")
            header = self._header = json.loads(self._data[8 : 8 + length].tobytes())
            self._start = 8 + length
        try:
            info = header[name]
        except KeyError:
            raise InvalidCheckpoint(f"{self._name}: has no array {name!r}") from None
        first, last = info["data_offsets"]
        return info["dtype"], info["shape"], self._data.ctypes.data + self._start + first, last - first
