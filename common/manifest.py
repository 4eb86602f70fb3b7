"""What a checkpoint is made of. The manifest is written last; a checkpoint without a valid one does not exist."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import xxhash

from .cores import available_cores
from .errors import CheckpointError, ConfigChanged, InvalidCheckpoint

FILE_NAME = "manifest.json"
FORMAT = 1
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".npy", ".tar", ".gz", ".zip")


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and xxh3_128 hash of one file of a checkpoint."""

    size: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """Everything that must be known about a checkpoint before its state is touched."""

    step: int
    epoch: int | None
    sequence: int  # counts the checkpoints of a task; the newest has the largest, whatever the clocks say
    metrics: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    files: dict[str, FileInfo]
    name: str | None = None  # given by the user: never deleted by retention
    resumed_from: list[int] = field(default_factory=list[int])
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    format: int = FORMAT

    def write(self, directory: Path) -> str:
        """Write the manifest, durably, and return its checksum."""
        body = asdict(self)
        checksum = _checksum(body)
        with open(directory / FILE_NAME, "x", encoding="utf-8") as file:
            json.dump({**body, "checksum": checksum}, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        return checksum

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest itself (not the files it lists). Raises InvalidCheckpoint."""
        try:
            content: Any = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InvalidCheckpoint(f"{FILE_NAME} is missing") from None
        except ValueError:
            raise InvalidCheckpoint(f"{FILE_NAME} is not valid JSON") from None
        body = cast("dict[str, Any]", content)
        if not isinstance(content, dict) or body.pop("checksum", None) != _checksum(body):
            raise InvalidCheckpoint(f"{FILE_NAME} was altered: its checksum differs")
        if body["format"] > FORMAT:
            raise CheckpointError(
                f"the checkpoint has format {body['format']}, this version reads up to {FORMAT}: upgrade"
            )
        files = {name: FileInfo(**info) for name, info in body.pop("files").items()}
        for name in files:
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise InvalidCheckpoint(f"{FILE_NAME} lists {name!r}, which is outside of the checkpoint")
        return cls(files=files, **body)


def _checksum(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def hash_file(path: Path) -> FileInfo:
    """Size and hash of a file, read in pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileInfo(size, digest.hexdigest())


def check_file(name: str, expected: FileInfo, found: FileInfo) -> None:
    """Raise InvalidCheckpoint when a file is not what the manifest says."""
    if found.size != expected.size:
        raise InvalidCheckpoint(f"{name}: {found.size} bytes instead of {expected.size}")
    if found.xxh3_128 != expected.xxh3_128:
        raise InvalidCheckpoint(f"{name}: its hash differs from the manifest's")


def check_names(directory: Path, manifest: Manifest) -> None:
    """Raise InvalidCheckpoint when a file of the manifest is missing, or one is there that it does not list."""
    present = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    missing = set(manifest.files) - present
    if missing:
        raise InvalidCheckpoint(f"{sorted(missing)[0]} is missing")
    extra = present - set(manifest.files) - {FILE_NAME}
    if extra:
        raise InvalidCheckpoint(f"{sorted(extra)[0]} does not belong to it")


def verify(directory: Path, manifest: Manifest) -> None:
    """Check every file of a checkpoint against its manifest. Raises InvalidCheckpoint, naming the first bad file."""
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise InvalidCheckpoint(f"{name} is missing")
        check_file(name, expected, hash_file(path))


def verify_directory(directory: Path) -> None:
    """Raise InvalidCheckpoint when a directory with a checkpoint is not what its manifest says."""
    manifest = Manifest.read(directory)
    check_names(directory, manifest)
    verify(directory, manifest)


def environment() -> dict[str, Any]:
    """Versions, thread count and devices: what bit-for-bit equality depends on besides the code."""
    found: dict[str, Any] = {
        "python": platform.python_version().rpartition(".")[0],
        "machine": platform.machine(),
    }
    for name in ("numpy", "torch", "lightning", "transformers", "keras", "tensorflow", "xgboost", "peft", "diffusers"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            found[name] = str(module.__version__)
    # what a framework was told, or else what it finds: the size of its thread pools decides the order of sums
    found["threads"] = os.environ.get("OMP_NUM_THREADS") or available_cores()
    found["device"] = "cpu"
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
    tensorflow: Any = sys.modules.get("tensorflow")
    if tensorflow is not None and hasattr(tensorflow, "config"):
        threading = tensorflow.config.threading
        if threading.get_intra_op_parallelism_threads():
            found["threads"] = threading.get_intra_op_parallelism_threads()
        for device in tensorflow.config.list_physical_devices("GPU"):
            found["device"] = tensorflow.config.experimental.get_device_details(device).get("device_name", "GPU")
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value differs: ``learning_rate: 0.001 -> 0.01``."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            nested = differences(cast("dict[str, Any]", before), cast("dict[str, Any]", after))
            lines += [f"{key}.{line}" for line in nested]
        elif before != after:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def check_config(manifest: Manifest, config: Mapping[str, Any], where: str) -> None:
    """Raise ConfigChanged with a named difference when ``config`` is not the one the checkpoint was made under."""
    lines = differences(manifest.config, config)
    if lines:
        raise ConfigChanged(
            f"{where} was made under another configuration:\n  "
            + "\n  ".join(lines)
            + "\nGo back to the old values, start a new training, or continue on purpose: allow_changes=True, which in "
            "the flows here is `run --resume-from RUN --allow-changes true`."
        )
