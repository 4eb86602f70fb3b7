"""A point-in-time copy of arrays in one reused buffer, laid out as a safetensors file.

The buffer *is* the file's data section, so writing a checkpoint is one sequential write with a hash running over
it. The layout is the public safetensors format (an 8-byte length, a JSON header, the data), so that any
safetensors reader opens the file: https://github.com/huggingface/safetensors#format
"""

import contextlib
import copy
import ctypes
import errno
import fcntl
import json
import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from .cores import available_cores, current_core, leave_core
from .encoding import NUMPY_OF, TORCH_OF, Array, encode
from .errors import CheckpointError, InvalidCheckpoint

_CHUNK = 8 << 20
_BLOCK = 4096  # what writing past the page cache is aligned to
_LARGE_STATE = 8 << 20  # bytes from which on that, and copying on more than one thread, is worth it
_LARGE_PAGE = 2 << 20  # bytes; a smaller tensor has no use for one
_PIECE = 2 << 20  # bytes copied or read at a time
_SMALL = 64 << 10  # bytes; for fewer, giving up the interpreter takes longer than the copy
_copy_small = ctypes.PyDLL(None).memmove  # which keeps it
_copy_small.argtypes, _copy_small.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None
_PARTS = 512  # buffers that one preadv fills; Linux takes 1024
_ITEMSIZE = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
             "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}  # fmt: skip


class Snapshot:
    """One buffer that holds the arrays of the last :meth:`take`; reused, because fresh memory is slow to touch."""

    def __init__(self) -> None:
        self._buffer = _memory(0)
        self._unpin: Callable[[], None] | None = None
        self._layout: list[tuple[str, str, tuple[int, ...], int]] = []  # name, dtype, shape, nbytes
        self._size = 0
        self._header: tuple[Any, bytes] = (None, b"")  # of the layout that was written last

    @property
    def nbytes(self) -> int:
        """Bytes of array data held."""
        return self._size

    def reserve(self, size: int, *, pinned: bool = False) -> None:
        """Have ``size`` bytes ready, touched: the first copy into fresh memory takes many times as long.

        ``pinned`` memory is what a GPU writes to at full speed; it cannot be swapped out.
        """
        self._allocate(size, pinned)
        self._buffer.fill(0)

    def take(self, arrays: Mapping[str, Array]) -> None:
        """Copy every array. Runs on the training thread; when it returns the arrays may change."""
        # widest first, as the safetensors library does, so that every tensor is aligned to its item size
        ordered = sorted(arrays.items(), key=lambda item: -_ITEMSIZE[item[1].dtype])
        self._layout = [(name, array.dtype, array.shape, array.nbytes) for name, array in ordered]
        self._size = sum(array.nbytes for array in arrays.values())
        torch = sys.modules.get("torch")
        cuda = torch is not None and torch.cuda.is_initialized()
        self._allocate(self._size, cuda and any(array.on_gpu for array in arrays.values()))
        base, offset = self._buffer.ctypes.data, 0
        from_gpu: list[tuple[Any, int]] = []
        pieces: deque[tuple[int, int, int]] = deque()
        for _, array in ordered:
            if cuda and array.on_gpu:
                from_gpu.append((array.source, offset))
            elif (address := array.address) is None:
                array.copy_to(base + offset)
            elif array.nbytes < _SMALL:
                _copy_small(base + offset, address, array.nbytes)
            else:
                for start in range(0, array.nbytes, _PIECE):
                    pieces.append((base + offset + start, address + start, min(_PIECE, array.nbytes - start)))
            offset += array.nbytes
        _copy_in_memory(pieces)
        if from_gpu:
            _copy_from_gpu(from_gpu, self._buffer)

    def copy(self, tree: Any) -> Any:
        """A deep copy of ``tree`` whose torch tensors are copied as by :meth:`take`; good until the next one."""
        torch: Any = import_module("torch")
        found: dict[str, Any] = {}
        _find_tensors(tree, torch.Tensor, found)
        arrays: dict[str, Array] = {}
        for name, tensor in found.items():
            with contextlib.suppress(CheckpointError):  # sparse, meta, a rare dtype: deepcopy copies it by itself
                arrays[name] = encode(tensor)[1][""]
        self.take(arrays)
        copies, offset = dict[int, Any](), 0
        for name, _, shape, nbytes in self._layout:
            tensor = found[name]
            memory = self._buffer[offset : offset + nbytes]
            # each in a storage of its own: torch.save would store the whole buffer with every view of it
            copies[id(tensor)] = (
                torch.frombuffer(memory, dtype=tensor.dtype).view(shape)
                if nbytes
                else torch.empty(shape, dtype=tensor.dtype, device="cpu")
            )
            offset += nbytes
        return copy.deepcopy(tree, copies)

    def write(self, path: Path) -> tuple[int, str]:
        """Write the snapshot to ``path``, durably. Returns its size in bytes and its xxh3_128 hash."""
        large = self._size >= _LARGE_STATE
        if self._header[0] != self._layout:
            self._header = self._layout, _header_of(self._layout, _BLOCK if large else 8)
        header = self._header[1]
        digest = xxhash.xxh3_128(header)
        data = memoryview(self._buffer)[: self._size]
        with open(path, "xb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(header))
            in_blocks = self._size // _BLOCK * _BLOCK if large else 0
            _bypass_cache(file.fileno(), large)
            for start, end in pairwise([*range(0, in_blocks, _CHUNK), in_blocks, self._size]):
                if start == in_blocks:  # less than a block is left
                    _bypass_cache(file.fileno(), False)
                digest.update(data[start:end])
                _write_all(file.fileno(), data[start:end])
            os.fsync(file.fileno())
        return len(header) + self._size, digest.hexdigest()

    def _allocate(self, size: int, pinned: bool) -> None:
        if size > self._buffer.nbytes:
            if self._unpin is not None:
                self._unpin()
                self._unpin = None
            self._buffer = _memory(size)
        if pinned and self._unpin is None:
            self._unpin = _pin(self._buffer)


def _header_of(layout: Sequence[tuple[str, str, tuple[int, ...], int]], alignment: int) -> bytes:
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype, shape, nbytes in layout:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + nbytes)}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def _find_tensors(tree: Any, kind: Any, found: dict[str, Any]) -> None:
    if type(tree) is kind and not tree.requires_grad:
        found[str(id(tree))] = tree
    elif isinstance(tree, (dict, list, tuple)):
        values = cast("Any", tree.values() if isinstance(tree, dict) else tree)
        for value in values:
            _find_tensors(value, kind, found)


def _pin(buffer: Any) -> Callable[[], Any]:
    # not torch's pin_memory=True, which rounds up to a power of two: 9 GB would take 16
    runtime: Any = cast("Any", import_module("torch")).cuda.cudart()
    runtime.cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)  # refused, the copy is slower and right all the same
    unpin = weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.ctypes.data)
    unpin.atexit = False
    return unpin


def _copy_in_memory(pieces: deque[tuple[int, int, int]]) -> None:
    # one more thread, where there is one more core, takes a third off the time that the training waits. Both take the
    # next piece that is left, so that one that has to share its core holds nobody up
    helper = None
    if sum(size for _, _, size in pieces) >= _LARGE_STATE and available_cores() > 1:
        helper = threading.Thread(target=_help_to_copy, args=(pieces, current_core()))
        helper.start()
    _copy_pieces(pieces)
    if helper is not None:
        helper.join()


def _help_to_copy(pieces: deque[tuple[int, int, int]], core: int) -> None:
    leave_core(core)
    _copy_pieces(pieces)


def _copy_pieces(pieces: deque[tuple[int, int, int]]) -> None:
    with contextlib.suppress(IndexError):
        while True:
            ctypes.memmove(*pieces.popleft())


def _copy_from_gpu(tensors: Sequence[tuple[Any, int]], buffer: Any) -> None:
    """Copy tensors to their offsets in ``buffer``, on a stream of their own, and wait: then they may change."""
    torch: Any = import_module("torch")
    target = torch.from_numpy(buffer)
    streams: dict[Any, Any] = {}
    for tensor, offset in tensors:
        stream = streams.get(tensor.device)
        if stream is None:
            stream = streams[tensor.device] = torch.cuda.Stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))  # the step that is still being computed
        with torch.cuda.stream(stream):
            place = target[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor.detach(), non_blocking=True)  # queued; none is waited for before all are
    for stream in streams.values():
        stream.synchronize()


def _memory(size: int) -> Any:
    # numpy's type hints have the buffer protocol from Python 3.12 on only, hence Any
    memory: Any = np.empty(size + _BLOCK, np.uint8)
    start = -memory.ctypes.data % _BLOCK
    return memory[start : start + size]


def _bypass_cache(fd: int, on: bool) -> bool:
    """Have writes go past the page cache, or no longer. Returns whether that changed: a file system may refuse.

    See O_DIRECT in open(2). Nothing reads a checkpoint soon, and copying it into the cache takes the training most of
    the processor time that a checkpoint costs. Memory, place in the file and size must be multiples of a block.
    """
    flag = getattr(os, "O_DIRECT", 0)  # Linux only
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if bool(flags & flag) == on:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags ^ flag)
    except OSError:
        return False
    return True


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        try:
            data = data[os.write(fd, data) :]
        except OSError as error:
            # a file system with larger blocks, or one that stopped within a block
            if error.errno != errno.EINVAL or not _bypass_cache(fd, False):
                raise


class StateFile:
    """A safetensors file, read straight into the memory of its tensors and hashed on the way.

    Ask for every :meth:`tensor` and :meth:`array`, then :meth:`read`: until then their content is undefined. What does
    not come out as expected may be damaged in any way, the header included, so nothing is allocated that the file's
    size does not bear out.

    Raises:
        InvalidCheckpoint: the header is not that of a safetensors file of this size.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._name = path, path.name
        self._targets: dict[str, tuple[Any, int]] = {}  # keeps the arrays alive while they are filled
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._prefix = file.read(8)
                length = int.from_bytes(self._prefix, "little")
                if length > self.size - 8:
                    raise ValueError(f"a header of {length} bytes")
                self._prefix += file.read(length)
            header = json.loads(self._prefix[8:])
            self._places = _places(header, self.size - len(self._prefix))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidCheckpoint(f"{self._name}: its header is damaged ({error})") from None

    def tensor(self, name: str) -> Any:
        """The array ``name`` as a torch tensor in memory of its own."""
        import torch

        dtype, shape, nbytes = self._find(name)
        # allocated by torch, as in a run that was never interrupted: a kernel may depend on the alignment
        tensor: Any = torch.empty(shape, dtype=getattr(torch, TORCH_OF[dtype]), device="cpu")
        self._targets[name] = tensor, tensor.data_ptr()
        _in_large_pages(tensor.data_ptr(), nbytes)
        return tensor

    def array(self, name: str) -> Any:
        """The array ``name`` as a numpy array in memory of its own."""
        dtype, shape, _ = self._find(name)
        array: Any = np.empty(shape, NUMPY_OF[dtype])
        self._targets[name] = array, array.ctypes.data
        return array

    def read(self) -> str:
        """Fill the tensors and arrays that were asked for; returns the xxh3_128 hash of the whole file."""
        digest = xxhash.xxh3_128(self._prefix)
        with open(self._path, "rb", buffering=0) as file, contextlib.ExitStack() as stack:
            in_order: Any = map
            if self.size >= _LARGE_STATE and available_cores() > 1:
                # two threads read, and fault their memory in, while this one hashes what has come
                in_order = stack.enter_context(ThreadPoolExecutor(2)).map
            for parts in in_order(partial(self._fill, file.fileno()), self._pieces()):
                for part in parts:
                    digest.update(part)
        return digest.hexdigest()

    def _pieces(self) -> Iterator[tuple[int, list[tuple[int | None, int]]]]:
        """Stretches of the file: where each begins, and the address (None: nobody asked) and size of its parts."""
        offset = begin = len(self._prefix)
        parts: list[tuple[int | None, int]] = []
        for name, (_, _, nbytes) in self._places.items():
            address = self._targets[name][1] if name in self._targets else None
            for start in range(0, nbytes, _PIECE):
                size = min(_PIECE, nbytes - start)
                if parts and (offset + size - begin > _PIECE or len(parts) == _PARTS):
                    yield begin, parts
                    begin, parts = offset, []
                parts.append((None if address is None else address + start, size))
                offset += size
        if parts:
            yield begin, parts

    def _fill(self, fd: int, piece: tuple[int, list[tuple[int | None, int]]]) -> list[memoryview]:
        offset, parts = piece
        views = [_view(address, size) for address, size in parts]
        left = views
        while left:
            count = os.preadv(fd, left, offset)
            if not count:
                raise InvalidCheckpoint(f"{self._name}: it became shorter while it was read")
            offset += count
            while left and count >= len(left[0]):
                count -= len(left[0])
                left = left[1:]
            if count:
                left = [left[0][count:], *left[1:]]
        return views

    def _find(self, name: str) -> tuple[str, list[int], int]:
        try:
            return self._places[name]
        except KeyError:
            raise InvalidCheckpoint(f"{self._name}: has no array {name!r}") from None


def _view(address: int | None, size: int) -> memoryview:
    memory: Any = bytearray(size) if address is None else (ctypes.c_char * size).from_address(address)
    return memoryview(memory).cast("B")


def _places(header: Any, size: int) -> dict[str, tuple[str, list[int], int]]:
    # name -> dtype, shape, nbytes, in the order of the file, without a gap, as Snapshot lays them out
    items = sorted(((name, info) for name, info in header.items()), key=lambda item: item[1]["data_offsets"])
    places: dict[str, tuple[str, list[int], int]] = {}
    end = 0
    for name, info in items:
        first, last = info["data_offsets"]
        dtype, shape = info["dtype"], info["shape"]
        if first != end or math.prod(shape) * _ITEMSIZE[dtype] != last - first or min(shape, default=0) < 0:
            raise ValueError(f"{name!r} does not fit")
        places[name] = dtype, shape, last - first
        end = last
    if end != size:
        raise ValueError(f"it tells of {end} bytes and {size} are there")
    return places


def _in_large_pages(address: int, nbytes: int) -> None:
    # numpy asks for them itself; a first touch in pages of 4 KB takes several times as long
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if nbytes >= _LARGE_PAGE and advice is not None:
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + nbytes - start), advice)
