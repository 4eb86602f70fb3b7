"""The S3 backend of metaflow-checkpoint over one client that is kept.

The library makes a new client for each small object (0.2 s) and starts a process for each listing and each set of
files (0.5 s). Here they share one client, made by Metaflow's own provider, so that endpoint, role, credentials,
encryption and retries are as configured. The objects are the same, under the same keys: either side reads what the
other wrote.
"""

import copy
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from .errors import CheckpointError, InvalidCheckpoint
from .manifest import FILE_NAME

_THREADS = 8  # requests at the same time; a client keeps 10 connections
_DATASTRUCTURES = "metaflow_extensions.obcheckpoint.plugins.machine_learning_utilities.datastructures"


class S3Error(CheckpointError, OSError):
    """S3 refused an operation, or did not answer for a long time."""


class _Content(NamedTuple):
    path: str
    is_file: bool


def keep_client(backend: Any, rounds: int | None = None) -> Any:
    """The same place through a client that is kept; ``backend`` itself where that is not S3 as this module knows it.

    Args:
        backend: a backend of metaflow-checkpoint.
        rounds: how often to try again when S3 does not answer, about a minute each; Metaflow's S3_RETRY_COUNT if None.
    """
    try:
        return S3Backend(backend, rounds) if backend.TYPE == "s3-compatible" else backend
    except (AttributeError, ImportError, TypeError):  # another version of the library
        return backend


class S3Backend:
    """The part of the library's backend that a save, a listing and a deletion need; the rest goes the library's way."""

    def __init__(self, library: Any, rounds: int | None = None) -> None:
        config: Any = import_module("metaflow.metaflow_config")
        s3: Any = import_module("metaflow.plugins.datatools.s3.s3")
        self._transfer: Any = import_module("boto3.s3.transfer")
        errors: Any = import_module("botocore.exceptions")
        self._refused: Any = errors.ClientError
        self._unanswered = (
            errors.ConnectionError,
            errors.HTTPClientError,
            errors.IncompleteReadError,
            import_module("s3transfer.exceptions").RetriesExceededError,
        )
        self._failures = (errors.BotoCoreError, errors.ClientError, *self._unanswered)
        self._record: Any = import_module(_DATASTRUCTURES).CheckpointArtifact
        _ = self._record.hydrate, self._record._delete
        self._library = library
        self._lock = threading.Lock()
        self._made = s3.S3Client(
            s3_role_arn=library._s3_role_arn,
            s3_session_vars=library._s3_session_vars,
            s3_client_params=copy.copy(library._s3_client_params),  # Metaflow's provider adds to it
        )
        self.TYPE: str = library.TYPE
        self.datastore_root: str = library.datastore_root
        place = urlparse(self.datastore_root, allow_fragments=False)
        self._bucket, self._root = place.netloc, place.path.strip("/")
        self._rounds: int = config.S3_RETRY_COUNT if rounds is None else rounds
        encryption: str | None = config.S3_SERVER_SIDE_ENCRYPTION
        self._extra = {"ServerSideEncryption": encryption} if encryption else {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def list_content(self, paths: Iterable[str]) -> list[_Content]:
        """What is directly in some folders; names of folders end with a slash."""
        found: list[_Content] = []
        for page in chain.from_iterable(self._pages(path, "/") for path in paths):
            found += [_Content(self._path(item["Key"]), True) for item in page.get("Contents", [])]
            found += [_Content(self._path(item["Prefix"]), False) for item in page.get("CommonPrefixes", [])]
        return found

    def walk(self, folders: Sequence[str]) -> dict[str, int]:
        """All files in some folders and below, with their sizes in bytes."""
        pages = chain.from_iterable(self._at_once(self._pages, folders))
        files = (item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/"))
        return {self._path(item["Key"]): item["Size"] for item in files}

    @contextmanager
    def load_bytes(self, paths: Sequence[str]) -> Generator[Iterator[tuple[str, str | None, None]]]:
        """A context with (path, temporary file or None, None) of each path: the library stores no attributes."""
        with tempfile.TemporaryDirectory(prefix="metaflow-s3-") as directory:

            def load(numbered: tuple[int, str]) -> tuple[str, str | None, None]:
                number, path = numbered
                target = Path(directory, str(number))
                return path, str(target) if self._get(path, target) else None, None

            yield iter(self._at_once(load, enumerate(paths)))

    def download(self, folder: str, directory: Path) -> None:
        """Put the files of a folder into ``directory``. Raises InvalidCheckpoint when one would leave it."""
        targets = {path: path.removeprefix(f"{folder}/") for path in self.walk([folder])}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in targets.values()):
            raise InvalidCheckpoint(f"{folder} has a file outside of its directory")
        for name in targets.values():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        self._transfers("download", [(path, str(directory / name)) for path, name in targets.items()])

    def save_bytes(self, path_and_bytes_iter: Iterable[tuple[str, Any]], overwrite: bool = True) -> None:
        """Store small objects, one after the other: one request each. They replace what is there."""
        for path, file in path_and_bytes_iter:
            self._call(partial(self._put, body=file.read()), path)

    def save_files(self, key_path_tuples: Iterable[tuple[str, str]], overwrite: bool = True) -> None:
        """Store files, large ones in parts; the manifest last, as everywhere. They replace what is there."""
        files = list(key_path_tuples)
        manifests = [pair for pair in files if Path(pair[1]).name == FILE_NAME]
        self._transfers("upload", [(key, path) for key, path in files if (key, path) not in manifests])
        self._transfers("upload", manifests)

    def delete(self, key: str) -> bool:
        """Delete one object."""
        self._call(lambda s3, key: s3.delete_object(Bucket=self._bucket, Key=key), key)
        return True

    def delete_prefix(self, key_prefix: str) -> bool:
        """Delete an object or a folder. Not what only begins with the same letters: version 1 is not version 10."""
        keys = [self._key(path) for path in (key_prefix, *self.walk([key_prefix]))]
        for start in range(0, len(keys), 1000):  # as many as one request may name
            self._call(partial(self._delete, keys=keys[start : start + 1000]), key_prefix)
        return True

    def delete_checkpoint(self, record: dict[str, Any]) -> None:
        """Delete a checkpoint of any origin, with its records."""
        self._record.hydrate(record)._delete(self)

    # ---------------------------------------------------------------- requests

    def _key(self, path: str) -> str:
        return f"{self._root}/{path.strip('/')}".strip("/")

    def _path(self, key: str) -> str:
        return key.removeprefix(f"{self._root}/") if self._root else key

    def _pages(self, folder: str, delimiter: str = "") -> list[Any]:
        def read(s3: Any, key: str) -> list[Any]:
            prefix = f"{key}/" if key else ""
            return list(
                s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix, Delimiter=delimiter)
            )

        return self._call(read, folder)

    def _put(self, s3: Any, key: str, body: bytes) -> None:
        s3.put_object(Bucket=self._bucket, Key=key, Body=body, **self._extra)

    def _delete(self, s3: Any, _: str, keys: list[str]) -> None:
        given = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        if failed := s3.delete_objects(Bucket=self._bucket, Delete=given).get("Errors"):
            raise S3Error(f"s3://{self._bucket}/{failed[0]['Key']} could not be deleted: {failed[0].get('Message')}")

    def _get(self, path: str, target: Path) -> bool:
        """Put an object into a file; False when there is no such object."""

        def read(s3: Any, key: str) -> bool:
            try:
                found = s3.get_object(Bucket=self._bucket, Key=key)
            except s3.exceptions.NoSuchKey:
                return False
            with found["Body"] as body, open(target, "wb") as file:
                shutil.copyfileobj(body, file)
            return True

        return self._call(read, path)

    def _transfers(self, way: str, pairs: list[tuple[str, str]]) -> None:
        def run(s3: Any, _: str) -> None:
            with self._transfer.create_transfer_manager(s3, self._transfer.TransferConfig()) as manager:
                if way == "upload":
                    futures = [manager.upload(file, self._bucket, self._key(path), self._extra) for path, file in pairs]
                else:
                    futures = [manager.download(self._bucket, self._key(path), file) for path, file in pairs]
                for future in futures:
                    future.result()

        if pairs:
            self._call(run, pairs[0][0])

    def _at_once(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(function, items))

    def _call(self, operation: Callable[[Any, str], Any], path: str) -> Any:
        """Run an operation, which the client itself tries ten times or as configured, about a minute."""
        left = {"passing": self._rounds, "refused": 1}
        while True:
            try:
                with self._lock:  # made once, also when threads ask for it at the same time
                    client = self._made.client
                return operation(client, self._key(path))
            except self._failures as error:
                kind = "passing" if self._is_passing(error) else "refused"
                if not left[kind]:
                    raise S3Error(
                        f"s3://{self._bucket}/{self._key(path)}: {error}. Check the bucket and path "
                        "(METAFLOW_DATASTORE_SYSROOT_S3), the endpoint (METAFLOW_S3_ENDPOINT_URL) and the credentials."
                    ) from error
                left[kind] -= 1
                if kind == "passing":
                    print(f"[checkpoints] S3 does not answer, trying again: {error}", flush=True)
                    time.sleep(min(2 ** (self._rounds - left[kind]), 60))
            # with the credentials of now: they may have been renewed in a file since
            self._made.reset_client()

    def _is_passing(self, error: Any) -> bool:
        if isinstance(error, self._refused):
            return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) in (429, *range(500, 600))
        return isinstance(error, self._unanswered)
