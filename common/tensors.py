"""Arrays in safetensors files, looked at without loading them: compared in pieces, copied to another file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .encoding import NUMPY_OF
from .errors import InvalidCheckpoint

_CHUNK = 4 << 20  # values compared at a time


@dataclass(frozen=True)
class Tensor:
    """Where an array lies in a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def raw(self) -> Any:
        return np.memmap(self.path, np.uint8, "r", self.start, (self.size,)) if self.size else np.empty(0, np.uint8)

    def values(self) -> Any:
        """As numbers; None for a type that numpy does not have."""
        if self.dtype == "BF16":
            return self.raw().view(np.uint16)
        return self.raw().view(NUMPY_OF[self.dtype]) if self.dtype in NUMPY_OF else None

    def compare(self, other: "Tensor") -> dict[str, Any] | None:
        """Share of values that changed, largest change, and the change relative to the whole (Euclidean norm).

        None when they are equal bit for bit; a value is None where it cannot be told.
        """
        about: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        nothing = {"changed": None, "largest": None, "relative": None}
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return {**about, "other": [other.dtype, *other.shape], **nothing}
        if np.array_equal(self.raw(), other.raw()):
            return None
        mine, others = self.values(), other.values()
        if mine is None:
            return {**about, **nothing}
        count, largest, square, norm = 0, 0.0, 0.0, 0.0
        for start in range(0, len(mine), _CHUNK):
            x, y = (_wide(part[start : start + _CHUNK], self.dtype) for part in (mine, others))
            with np.errstate(all="ignore"):
                difference = np.nan_to_num(abs(x - y), nan=np.inf, posinf=np.inf)
                count += int(np.count_nonzero(difference))
                largest = max(largest, float(difference.max()))
                square += float((difference**2).sum())
                norm += float((abs(x) ** 2).sum())
        relative = (square / norm) ** 0.5 if norm else None
        finite = [value if value is not None and np.isfinite(value) else None for value in (largest, relative)]
        return {**about, "changed": count / len(mine), "largest": finite[0], "relative": finite[1]}


def _wide(values: Any, dtype: str) -> Any:
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.complex128 if dtype == "C64" else np.float64)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The arrays of a safetensors file by name. Raises InvalidCheckpoint."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length) if length < size else b"")
    except ValueError:
        raise InvalidCheckpoint(f"{path.name} is no safetensors file or was cut short") from None
    header.pop("__metadata__", None)
    found: dict[str, Tensor] = {}
    for name, info in header.items():
        first, last = info["data_offsets"]
        if 8 + length + last > size:
            raise InvalidCheckpoint(f"{path.name} was cut short")
        found[name] = Tensor(path, info["dtype"], tuple(info["shape"]), 8 + length + first, last - first)
    return found


def write_safetensors(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write arrays of other files to a new one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what readers of Hugging Face ask for
    offset = 0
    for name, tensor in tensors.items():
        last = offset + tensor.size
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, last]}
        offset = last
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(memoryview(tensor.raw()))
