"""The Hugging Face Hub, used right together with Metaflow's ``@huggingface_hub``.

A download is Metaflow's own call; what this module adds is the commit, the endpoint and clear errors::

    @huggingface_hub(cache_scope="flow")  # or "global"; the default scope leaves the revision out of the cache key
    @step
    def start(self):
        self.commit = common.hub.resolve(self.model, self.revision)
        with common.hub.clear_errors(self.model, self.commit):
            self.base_model = current.huggingface_hub.snapshot_download(
                repo_id=self.model, revision=self.commit, allow_patterns=["*.json", "*.safetensors"],
                endpoint=common.hub.endpoint(self.model),
            )

    @model(load=["base_model"])
    @step
    def train(self):
        base = common.hub.private_copy(current.model.loaded["base_model"], self.commit)

The next run, every worker, and ``@huggingface_hub(load=[{"repo_id": ..., "revision": COMMIT, ...}])`` with the same
scope, commit and patterns take it from the datastore. Three things to know:

- Patterns are part of the key as they are written, but not whether they allow or ignore: use one of the two.
- Never pass ``token=``: Metaflow writes the arguments next to the cached files. Set HF_TOKEN, or log in.
- If a download fails, let the task fail; its retry starts in an empty directory. In the same task another download
  would be stored with the leftovers, and in an outage the client takes leftovers for the download itself.

Names under ``local/`` are served by a loopback hub (loopback_hub.py) with tiny models (tiny_models.py).
"""

import atexit
import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from .loopback_hub import LoopbackHub
from .scratch import Scratch
from .tiny_models import BUILDERS

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30  # seconds for an answer to a question of a few hundred bytes

_lock = threading.Lock()
_local_hub: LoopbackHub | None = None
_scratch: Scratch | None = None


class HubError(Exception):
    """Something about the Hub went wrong; the message says what happened and what to do."""


def resolve(repo_id: str, revision: str = "main", *, repo_type: str = "model") -> str:
    """The 40-hex commit of a branch, a tag or a commit. Ask once, keep it as an artifact, and use it from then on.

    A commit is returned as it is, without a request, so that a pinned run works offline. For the files of a gated
    repository access is checked, too.

    Args:
        repo_id: such as ``"org/model"``, or a name under ``local/``.
        revision: branch, tag or commit.
        repo_type: ``"model"``, ``"dataset"`` or ``"space"``.

    Raises:
        HubError: gated, missing or private, unknown revision, refused token, offline mode, no connection.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    if not revision:
        raise HubError(f"The revision of {repo_id} is empty. Give a branch (main), a tag or a 40-hex commit.")
    with clear_errors(repo_id, revision, repo_type=repo_type):
        client = api(repo_id)
        info = client.repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=_TIMEOUT)
        if info.gated:  # the Hub shows it to everyone, and refuses only the files
            client.auth_check(repo_id, repo_type=repo_type)
    if not _COMMIT.fullmatch(info.sha or ""):
        raise HubError(
            f"{_address(repo_id)} did not say which commit {revision!r} of {repo_id} is (it said {info.sha!r}). A "
            f"mirror may not know commits: give the revision as a 40-hex commit."
        )
    return info.sha


def endpoint(repo_id: str) -> str | None:
    """What to pass as ``endpoint=`` to the Hub's client: None, so that HF_ENDPOINT and its default hold, or the URL of
    the loopback hub for names under ``local/``, which is started on first use and ends with the process.

    The hubs of all processes of a user serve one directory, ``$HF_HOME/loopback_hub``.
    """
    global _local_hub
    if not repo_id.startswith("local/"):
        return None
    with _lock:
        if _local_hub is None:
            allow_loopback()
            _local_hub = LoopbackHub(local_directory())
        if repo_id in BUILDERS:
            _local_hub.seed(repo_id, BUILDERS[repo_id])
        return _local_hub.url


def local_directory() -> Path:
    """Where the contents of the hub for ``local/`` names lie. Delete it to start anew."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(cache, "huggingface")).expanduser() / "loopback_hub"


def api(repo_id: str) -> Any:
    """A ``huggingface_hub.HfApi`` for the hub that has ``repo_id``."""
    return _library().HfApi(endpoint=endpoint(repo_id))


def allow_loopback() -> None:
    """Let this process's Hub client talk to 127.0.0.1 whatever the environment says about proxies and offline mode.

    It also turns Xet off in this process, because a loopback hub takes uploads in the older way (which the real Hub
    takes as well).
    """
    library, constants = _library(), import_module("huggingface_hub.constants")
    http: Any = import_module("huggingface_hub.utils._http")
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        if "127.0.0.1" not in hosts:
            os.environ[name] = ",".join([*hosts, "127.0.0.1"])

    def client() -> Any:
        made = http.default_client_factory()
        hooks = made.event_hooks
        # the hook that refuses requests in offline mode
        refuse = [_except_loopback(hook) for hook in hooks["request"]]
        made.event_hooks = {**hooks, "request": refuse}
        return made

    library.set_client_factory(client)
    constants.HF_HUB_DISABLE_XET = True  # pyright: ignore[reportAttributeAccessIssue]


def _except_loopback(hook: Any) -> Any:
    def guarded(request: Any) -> None:
        if request.url.host != "127.0.0.1":
            hook(request)

    return guarded


@contextlib.contextmanager
def clear_errors(repo_id: str, revision: str = "main", *, repo_type: str = "model") -> Generator[None]:
    """Put this around a call of the Hub's client, or of ``@huggingface_hub``: its errors become a :class:`HubError`.

    Errors that have nothing to do with the Hub pass unchanged.
    """
    try:
        yield
    except Exception as error:
        message = _explain(error, repo_id, revision, repo_type)
        if message is None:
            raise
        raise HubError(message) from None  # the message says it, and the client's own traceback is a page long


def verify(directory: str | os.PathLike[str], commit: str) -> int:
    """Check what ``@huggingface_hub`` loaded: all files are of this commit, whole, and nothing else is there.

    The client keeps the Hub's hash of each file in ``.cache``, and ``@huggingface_hub`` stores that, too.

    Args:
        directory: the loaded files.
        commit: the 40-hex commit that they should be of.

    Returns:
        How many files there are.

    Raises:
        HubError: a file is damaged, missing, of another commit or not of this download.
    """
    root = Path(directory)
    records = root / ".cache" / "huggingface" / "download"
    names = {_relative(path, records).removesuffix(".metadata") for path in _files(records, "*.metadata")}
    problem = ""
    if not names:
        problem = "there is no record of a download"
    elif unfinished := _files(records, "*.incomplete"):
        problem = f"a download was broken off ({unfinished[0].name})"
    elif strangers := {_relative(path, root) for path in _files(root, "*")} - names:
        problem = f"{min(strangers)} is not of this download"
    for name in sorted(names):
        problem = problem or _file_problem(root / name, records / f"{name}.metadata", commit)
    if problem:
        raise HubError(
            f"{root} is not commit {commit}: {problem}. If it came out of the datastore, download again, once, with "
            f'force_download=True, and use cache_scope="flow" or "global".'
        )
    return len(names)


def private_copy(source: str | os.PathLike[str], commit: str, into: str | os.PathLike[str] | None = None) -> Path:
    """A verified copy of what ``@huggingface_hub`` or ``@model(load=)`` loaded, which you may write to.

    On the local datastore they load symlinks: whoever writes into those files changes the cache of every run.

    Args:
        source: the loaded directory.
        commit: the 40-hex commit that the files should be of; see :func:`verify`.
        into: a directory that does not exist; it appears when it is complete. By default a temporary one, which goes
            with this process.

    Raises:
        HubError: ``into`` exists, or the files are not whole.
    """
    target = Path(into) if into is not None else _scratch_directory() / Path(source).name
    if target.exists():
        raise HubError(f"{target} exists. Give a directory that does not, or delete it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        copy = Path(scratch, "copy")
        shutil.copytree(source, copy)
        verify(copy, commit)
        shutil.rmtree(copy / ".cache")
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # what is in the store may be read-only
        copy.rename(target)
    return target


def _scratch_directory() -> Path:
    global _scratch
    with _lock:
        if _scratch is None:
            _scratch = Scratch(Path(tempfile.gettempdir(), f"metaflow-hub-{os.getuid()}"))
        return _scratch.directory()


def _remove_scratch() -> None:
    if _scratch is not None:
        _scratch.remove()


def _library() -> Any:
    try:
        return import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise HubError("The package huggingface_hub is missing: pip install huggingface_hub") from error


def _address(repo_id: str) -> str:
    return endpoint(repo_id) or import_module("huggingface_hub.constants").ENDPOINT


def _explain(error: Exception, repo_id: str, revision: str, repo_type: str) -> str | None:
    """What happened and what to do, or None if it is not about the Hub."""
    errors: Any = import_module("huggingface_hub.errors")
    causes = list(_causes(error))

    def is_a(*names: str) -> bool:
        return any(isinstance(cause, getattr(errors, name)) for cause in causes for name in names)

    where, what = _address(repo_id), f"{'data set' if repo_type == 'dataset' else repo_type} {repo_id}"
    page = f"{where}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
    has_token = _library().get_token() is not None
    answers: list[Any] = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
    status: int | None = answers[0].response.status_code if answers else None
    if is_a("HFValidationError"):
        return f"{repo_id!r} is not the name of a repository. Names look like org/name."
    if is_a("GatedRepoError"):
        who = "your account has no access to it" if has_token else "no token is set"
        log_in = "" if has_token else " and set HF_TOKEN (or run: hf auth login)"
        return f"The {what} is gated, and {who} (HTTP {status}). Accept its terms on {page}{log_in}, then run again."
    if is_a("RevisionNotFoundError"):
        return (
            f"The {what} has no revision {revision!r} at {where}. {_known_revisions(repo_id, repo_type)}"
            f"Give a branch, a tag or a 40-hex commit."
        )
    if status == 401 and has_token:
        return (
            f"{where} refused the token, or there is no {what} (HTTP 401). Set HF_TOKEN to a valid one (or run: "
            f"hf auth login), and check the name and the repo_type."
        )
    if is_a("RepositoryNotFoundError"):
        if repo_id.startswith("local/"):
            return f"The loopback hub has no {what}. It builds {', '.join(sorted(BUILDERS))}; push others first."
        token = "your token may not read it" if has_token else "no token is set; for a private one set HF_TOKEN"
        return (
            f"There is no {what} at {where}, or it is private ({token}; HTTP {status}). Check the name, the repo_type "
            f"and HF_ENDPOINT."
        )
    if is_a("OfflineModeIsEnabled"):
        return (
            f"HF_HUB_OFFLINE is set, and revision {revision!r} of the {what} is not in the datastore. Unset it for one "
            f"run, which downloads it for all later ones; those work offline if the revision is a 40-hex commit."
        )
    if is_a("RemoteEntryNotFoundError"):
        return f"A file is missing in the {what} at {revision}: {_first_line(error)}. Check its name and the revision."
    if status == 429:
        return f"{where} answers too many requests (HTTP 429) for the {what}. Wait, or set HF_TOKEN for a higher limit."
    if status is not None:
        return f"{where} answered HTTP {status} for the {what} at {revision}: {_first_line(error)}. Try again later."
    if is_a("LocalEntryNotFoundError") or any(_is_connection(cause) for cause in causes):
        return (
            f"The connection to {where} failed for the {what} at {revision} ({type(causes[-1]).__name__}: "
            f"{_first_line(causes[-1])}). Nothing was cached. Run again; if it stays so, check the network, the proxy "
            f"and HF_ENDPOINT."
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_connection(error: BaseException) -> bool:
    """Errors of the HTTP client (httpx, which the Hub's client renames from time to time), and cut files."""
    of_client = type(error).__module__.split(".")[0].startswith("httpx")
    return of_client or (isinstance(error, OSError) and "Consistency check failed" in str(error))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "no message"


def _known_revisions(repo_id: str, repo_type: str) -> str:
    try:
        refs = api(repo_id).list_repo_refs(repo_id, repo_type=repo_type)
    except Exception:  # this is a hint in a message about another error
        return ""
    names = [ref.name for ref in [*refs.branches, *refs.tags]]
    return f"There are: {', '.join(names[:20])}. "


def _files(root: Path, pattern: str) -> list[Path]:
    """The files below ``root``, also behind symlinks, without ``.cache``, which has files that differ every time."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name != ".cache" or Path(folder) != root]
        found += [path for name in names if (path := Path(folder, name)).match(pattern)]
    return sorted(found)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _file_problem(path: Path, record: Path, commit: str) -> str:
    """What is wrong with a file, or an empty string."""
    lines = record.read_text().split()
    if len(lines) < 2 or lines[0] != commit:
        return f"{path.name} is of commit {lines[0] if lines else 'unknown'}"
    if not path.is_file():
        return f"{path.name} is missing"
    etag = lines[1]  # SHA-256 of an LFS file, git's SHA-1 of any other
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1024**2):
            digest.update(chunk)
    return "" if digest.hexdigest() == etag else f"{path.name} is damaged, its hash differs from the Hub's"


def _forget() -> None:
    """A forked child has the server's socket but not its thread, and its parent's temporary files are not its own."""
    global _lock, _local_hub, _scratch
    _lock, _local_hub, _scratch = threading.Lock(), None, None


os.register_at_fork(after_in_child=_forget)
atexit.register(_remove_scratch)
