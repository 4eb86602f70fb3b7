"""An exact encoding of nested Python state: arrays on one side, JSON on the other. Nothing is pickled.

``encode`` walks a tree of dicts, lists, tuples and scalars (what ``state_dict()`` methods return) and takes every
tensor and numpy array out of it. What JSON cannot say exactly is written as a one-key object whose key starts
with ``$``: integer keys, tuples, NaN and infinities, bytes, numpy scalars. ``decode`` is the inverse.
"""

import base64
import collections
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from .errors import CheckpointError


class History(list[dict[str, Any]]):
    """A list of metric records that were checked when they were appended and never change afterwards.

    Encoding copies the list and not the records, so that the cost of a snapshot does not grow with the
    length of a training by more than a pointer a record.
    """


class Array(NamedTuple):
    """A tensor or numpy array met by :func:`encode`: how to describe it, and the thing itself."""

    dtype: str  # in safetensors' names: F32, I64, BOOL, ...
    shape: tuple[int, ...]
    nbytes: int
    source: Any  # a contiguous numpy array or a torch tensor

    @property
    def on_gpu(self) -> bool:
        return type(self.source) is not np.ndarray and self.source.is_cuda

    @property
    def address(self) -> int | None:
        """Where the bytes lie, or None when they do not lie in a row in this machine's memory."""
        source = self.source
        if type(source) is np.ndarray:
            return source.ctypes.data
        if source.is_cpu and source.is_contiguous() and not source.is_neg() and not source.is_conj():
            return source.data_ptr()
        return None

    def copy_to(self, target: int) -> None:
        """Write ``nbytes`` to a memory address."""
        # memmove on one thread: torch's own copy_ takes 7 to 37 times as long when it spreads over busy cores
        address = self.address
        if address is not None:
            ctypes.memmove(target, address, self.nbytes)
            return
        source = self.source.detach().cpu().resolve_conj().resolve_neg().contiguous()
        ctypes.memmove(target, source.data_ptr(), self.nbytes)


# safetensors' name of each dtype; torch's names are looked up by string so that this module never imports torch
_NUMPY_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip
_TORCH_DTYPES = {
    **{name: code for name, code in _NUMPY_DTYPES.items()},
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_PLAIN = {int, bool, str, type(None)}
NUMPY_OF = {code: name for name, code in _NUMPY_DTYPES.items()}
_CODE_OF: dict[Any, str] = {}  # of the torch.dtype objects met so far
TORCH_OF = {code: name for name, code in _TORCH_DTYPES.items()}


def encode(tree: Any) -> tuple[Any, dict[str, Array]]:
    """Split ``tree`` into a JSON-able tree and the arrays in it, keyed by their path (``model/0.weight``).

    Raises CheckpointError, naming the path, for an object that has no exact encoding.
    """
    arrays: dict[str, Array] = {}
    return _encode(tree, "", arrays), arrays


def _encode(value: Any, path: str, arrays: dict[str, Array]) -> Any:
    # the kinds that a checkpoint has by the hundred first: each costs time on the training thread
    kind = cast("type[Any]", type(value))
    if kind in _PLAIN:
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return {"$tensor": _take(path, _torch_array(value, path, torch), arrays)}
    if kind in (dict, collections.OrderedDict, collections.Counter):
        return _encode_dict(cast("dict[Any, Any]", value), path, arrays)
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is History:
        return {"$history": list(value)}
    if kind is list:
        return _encode_items(value, path, arrays)
    if isinstance(value, tuple):  # torch.Size and named tuples become plain tuples
        return {"$tuple": _encode_items(cast("tuple[Any, ...]", value), path, arrays)}
    if kind in (bytes, bytearray):
        return {f"${kind.__name__}": base64.b64encode(value).decode()}
    if kind in (np.ndarray, np.memmap):
        array = cast("np.ndarray[Any, Any]", value)
        if array.flags.f_contiguous and not array.flags.c_contiguous:  # a sum over it runs in another order
            return {"$numpy_f": _take(path, _numpy_array(array.T, path), arrays)}
        return {"$numpy": _take(path, _numpy_array(array, path), arrays)}
    if kind in (np.str_, np.bytes_):
        return {"$scalar": [kind.__name__, _encode(value.item(), path, arrays)]}
    if isinstance(value, np.generic) and (scalar := cast("np.generic[Any]", value)).dtype.name in _NUMPY_DTYPES:
        return {"$scalar": [scalar.dtype.name, _encode(scalar.item(), path, arrays)]}
    raise CheckpointError(
        f"cannot save {path or 'the state'}: a {kind.__module__}.{kind.__qualname__} has no exact, pickle-free form. "
        "A checkpoint holds tensors, numpy arrays, numbers, strings, bytes, lists, tuples and dicts; give the object "
        "a state_dict() of those."
    )


def _encode_items(items: Sequence[Any], path: str, arrays: dict[str, Array]) -> list[Any]:
    if _PLAIN.issuperset(map(type, items)):  # the 625 numbers of Python's random state, in every checkpoint
        return list(items)
    return [_encode(item, f"{path}/{i}", arrays) for i, item in enumerate(items)]


def _encode_dict(value: dict[Any, Any], path: str, arrays: dict[str, Array]) -> Any:
    plain = type(value) is not collections.Counter
    prefix = f"{path}/" if path else ""
    encoded: dict[Any, Any] = {}
    for key, item in value.items():
        encoded[key] = _encode(item, f"{prefix}{key}", arrays)
        plain = plain and type(key) is str and key[:1] != "$"
    if plain:
        return encoded
    pairs = [[_encode_key(key, path), item] for key, item in encoded.items()]
    return {"$counter" if isinstance(value, collections.Counter) else "$dict": pairs}


def _encode_key(key: Any, path: str) -> Any:
    if type(key) is int:
        return key
    if isinstance(key, (str, int, float, bool, tuple)) or key is None:
        return _encode(key, path, {})
    raise CheckpointError(f"cannot save {path}: the dict key {key!r} is not a string, number or tuple of those")


def _take(path: str, array: Array, arrays: dict[str, Array]) -> str:
    name = path
    while name in arrays:  # {"a": {"b": x}, "a/b": y} would meet in one name
        name += "'"
    arrays[name] = array
    return name


def _numpy_array(value: "np.ndarray[Any, Any]", path: str) -> Array:
    if value.dtype.name not in _NUMPY_DTYPES or not value.dtype.isnative:
        raise CheckpointError(
            f"cannot save {path}: numpy arrays of dtype {value.dtype!r} have no exact, pickle-free form"
        )
    contiguous = cast("Any", np.ascontiguousarray(value)).view(np.ndarray)
    return Array(_NUMPY_DTYPES[value.dtype.name], value.shape, contiguous.nbytes, contiguous)


def _torch_array(value: Any, path: str, torch: Any) -> Array:
    code = _CODE_OF.get(value.dtype)
    if code is None:  # the first one of this type
        code = _CODE_OF[value.dtype] = _TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."), "")
    if not code or value.layout != torch.strided or value.is_meta:
        raise CheckpointError(
            f"cannot save {path}: a tensor of {value.dtype} and {value.layout} on {value.device} is not supported"
        )
    if value.data_ptr() == 0 and value.nbytes:
        raise CheckpointError(
            f"cannot save {path}: a {type(value).__name__} that has no memory of its own is not supported; gather a "
            "DTensor (FSDP2, tensor parallelism) first, such as by its full_tensor()"
        )
    return Array(code, value.shape, value.nbytes, value)


def decode(tree: Any, tensor: Callable[[str], Any], array: Callable[[str], Any]) -> Any:
    """Rebuild what :func:`encode` took apart; ``tensor(name)`` and ``array(name)`` deliver the arrays."""

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        items = cast("dict[str, Any]", value)
        tag = next(iter(items)) if len(items) == 1 else ""
        if not tag.startswith("$"):
            return {key: walk(item) for key, item in items.items()}
        content = items[tag]
        if tag == "$tensor":
            return tensor(content)
        if tag == "$numpy":
            return array(content)
        if tag == "$history":
            return History(content)
        if tag == "$float":
            return float(content)
        if tag == "$numpy_f":
            return array(content).T
        if tag == "$tuple":
            return tuple(walk(content))
        if tag == "$bytes":
            return base64.b64decode(content)
        if tag == "$bytearray":
            return bytearray(base64.b64decode(content))
        if tag == "$scalar":
            return np.dtype(content[0]).type(walk(content[1]))
        if tag in ("$dict", "$counter"):
            pairs = {walk(key): walk(item) for key, item in content}
            return collections.Counter(pairs) if tag == "$counter" else pairs
        raise CheckpointError(f"unknown tag {tag!r}: this checkpoint was written by a newer version")

    return walk(tree)


def plain_metrics(metrics: Mapping[str, Any] | None, step: int) -> dict[str, Any]:
    """Metrics as plain, finite JSON, or a CheckpointError that names the bad one."""
    plain: dict[str, Any] = {}
    for name, value in (metrics or {}).items():
        if type(name) is not str:
            raise CheckpointError(f"a metric at step {step} is called {name!r}: its name must be a string")
        plain[name] = plain_json(value, f"metric {name!r} at step {step}")
    return plain


def plain_json(value: Any, what: str) -> Any:
    """``value`` as plain, finite JSON, or a CheckpointError that names what is wrong.

    Used for metrics and configurations. Zero-dimensional arrays and tensors become numbers.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(
                f"{what} is {value!r}: only finite numbers can be recorded. Has the training diverged?"
            )
        return float(value)
    if isinstance(value, (list, tuple)):
        return [plain_json(item, f"{what}[{i}]") for i, item in enumerate(cast("list[Any]", value))]
    if isinstance(value, dict):
        return dict(_plain_items(cast("dict[Any, Any]", value), what))
    raise CheckpointError(f"{what} is a {type(value).__name__}: only numbers, strings, lists and dicts can be recorded")


def _plain_items(value: dict[Any, Any], what: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{what} has the key {key!r}: keys must be strings")
        yield key, plain_json(item, f"{what}[{key!r}]")
