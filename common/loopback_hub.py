"""A small Hugging Face Hub on 127.0.0.1: real HTTP, for the real ``huggingface_hub`` client. Standard library only.

Examples download their ``local/`` models from it and publish to it without a network, and you can test your own hub
code on it::

    with LoopbackHub(tmp_path / "hub") as hub:
        subprocess.run([sys.executable, "my_script.py"], env={**os.environ, **hub.environment}, check=True)
        hub.fail("GET .*safetensors", cut_after=1000)  # what does my code do when a download breaks?
        assert hub.count("POST .*/commit/") == 1

It knows repositories (models, data sets, spaces), branches, tags and commits, regular and LFS files, ranges, private
and gated repositories and collections. It does not know pull requests, Xet, paging, and filters other than author and
search: such a request is answered with 404. Contents lie in a directory, and any number of hubs, also of several
processes, can serve the same one: files are written beside and renamed, changes are made under a lock.
"""

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import socket
import socketserver
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qs, unquote, urlsplit

OWNER = "local"  # who everybody is on a hub without tokens
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".h5", ".keras", ".onnx", ".gguf", ".parquet", ".npz", ".zip")
_LFS_SIZE = 10 * 1024**2  # the Hub's limit for regular files
_CHUNK = 1024**2


@dataclass
class Request:
    """A request as the hub saw it. Headers are left out: they carry tokens.

    Attributes:
        method, path: such as GET and /local/tiny/resolve/main/config.json, without the query.
        range: the Range header, or an empty string.
        status: what was answered; 0 as long as nothing was.
    """

    method: str
    path: str
    range: str
    status: int = 0


@dataclass
class _Fault:
    pattern: re.Pattern[str]
    status: int | None
    hang: float | None
    cut_after: int | None
    times: int | None


class LoopbackHub:
    """A hub that serves ``directory`` from a thread of this process, until it is closed or the process ends.

    Args:
        directory: where the contents lie; made when missing.
        tokens: user names by access token. Private repositories and the files of gated ones are then for the owner of
            their namespace only, and so is writing. Without it nobody needs a token and everybody may do everything.

    Attributes:
        url: the endpoint, ``http://127.0.0.1:PORT``.
        requests: every :class:`Request` in order.
    """

    def __init__(self, directory: str | os.PathLike[str], tokens: Mapping[str, str] | None = None) -> None:
        self.store = _Store(Path(directory))
        self.tokens = dict(tokens) if tokens is not None else None
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._faults: list[_Fault] = []
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "LoopbackHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving. The directory stays."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that send a child process to this hub; the client reads them once, when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def seed(self, repo_id: str, build: Callable[[Path], None], repo_type: str = "model") -> str:
        """Make a repository of the files that ``build`` writes into an empty directory, unless it exists.

        Returns the commit at the tip of main. The same files give the same commit, everywhere.
        """
        record = self.store.read(f"{repo_type}s", repo_id)
        if record is None:
            with tempfile.TemporaryDirectory() as scratch:
                build(Path(scratch))
                files = {
                    path.relative_to(scratch).as_posix(): self.store.add(path.read_bytes(), is_lfs(path.name))
                    for path in sorted(Path(scratch).rglob("*"))
                    if path.is_file()
                }
            with self.store.lock():  # another process may have been faster
                record = self.store.read(f"{repo_type}s", repo_id)
                if record is None:
                    record = new_repository()
                    record["branches"]["main"] = add_commit(record, files, f"Add {repo_id}", OWNER, None)
                    self.store.write(f"{repo_type}s", repo_id, record)
        return record["branches"]["main"]

    def fail(
        self,
        pattern: str,
        *,
        status: int | None = None,
        hang: float | None = None,
        cut_after: int | None = None,
        times: int | None = 1,
    ) -> None:
        """Let requests fail whose "METHOD /path" has a match of the regular expression ``pattern``.

        Args:
            status: answer with this status code.
            hang: do not answer for so many seconds, then break the connection.
            cut_after: break the connection after so many bytes of the answer's body.
            times: how many requests; None: all that follow.
        """
        self._faults.append(_Fault(re.compile(pattern), status, hang, cut_after, times))

    def count(self, pattern: str = "") -> int:
        """How many requests there were whose "METHOD /path" has a match of ``pattern``."""
        return sum(bool(re.search(pattern, f"{request.method} {request.path}")) for request in list(self.requests))

    def next_fault(self, request: Request) -> _Fault | None:
        """The fault for this request, counted down."""
        for fault in self._faults:
            if fault.times != 0 and fault.pattern.search(f"{request.method} {request.path}"):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


# What is stored. A repository is one JSON file:
#   {"created", "private", "gated", "branches": {name: commit}, "tags": {name: commit}, "commits": {commit: {"parent",
#    "title", "message", "author", "date", "files": {path: {"oid", "size"}}}}}
# A file's content lies under its oid, which is what the Hub sends as ETag: the SHA-256 of an LFS file, git's SHA-1 of
# a regular one.


class _Store:
    """The directory. Readers need no lock, because files are only ever replaced as a whole."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Generator[None]:
        """Held by whoever reads a record in order to change it, in any thread of any process."""
        with open(self.root / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def blob(self, oid: str) -> Path:
        return self.root / "blobs" / oid

    def add(self, data: bytes, lfs: bool) -> dict[str, Any]:
        """Store a file's content and return its entry in a commit."""
        oid = hashlib.sha256(data).hexdigest() if lfs else git_blob_id(data)
        if not self.blob(oid).exists():
            self._replace(self.blob(oid), data)
        return {"oid": oid, "size": len(data)}

    def add_stream(self, oid: str, chunks: Iterator[bytes]) -> bool:
        """Store an LFS file. False, and nothing is kept, if its SHA-256 is not ``oid``."""
        digest = hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.root / "blobs", prefix=".new-", delete=False) as file:
            try:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                file.flush()
                if digest.hexdigest() == oid:
                    os.replace(file.name, self.blob(oid))
            finally:
                Path(file.name).unlink(missing_ok=True)
        return digest.hexdigest() == oid

    def record(self, kind: str, repo: str) -> Path:
        return self.root / "repositories" / kind / f"{repo}.json"

    def read(self, kind: str, repo: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.record(kind, repo).read_text())
        except FileNotFoundError:
            return None

    def write(self, kind: str, repo: str, record: dict[str, Any]) -> None:
        self._replace(self.record(kind, repo), json.dumps(record, indent=1).encode())

    def list(self, kind: str) -> list[str]:
        names = (self.root / "repositories" / kind).glob("*/*.json")
        return sorted(f"{path.parent.name}/{path.name.removesuffix('.json')}" for path in names)

    def collections(self) -> dict[str, dict[str, Any]]:
        path = self.root / "collections.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_collections(self, collections: dict[str, dict[str, Any]]) -> None:
        self._replace(self.root / "collections.json", json.dumps(collections, indent=1).encode())

    def _replace(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
            file.write(data)
        os.replace(file.name, path)


def is_lfs(path: str, size: int = 0) -> bool:
    """Whether the Hub would keep this file in LFS."""
    return path.endswith(_LFS_SUFFIXES) or size > _LFS_SIZE


def git_blob_id(data: bytes) -> str:
    """The object id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def new_repository(private: bool = False) -> dict[str, Any]:
    """The record of an empty repository."""
    return {"created": _now(), "private": private, "gated": False, "branches": {}, "tags": {}, "commits": {}}


def add_commit(
    record: dict[str, Any], files: dict[str, Any], title: str, author: str, parent: str | None, message: str = ""
) -> str:
    """Add a commit to a record and return its id, which depends on everything but author and date."""
    commit = hashlib.sha1(json.dumps([parent, title, message, files], sort_keys=True).encode()).hexdigest()
    record["commits"][commit] = {
        "parent": parent,
        "title": title,
        "message": message,
        "author": author,
        "date": _now(),
        "files": files,
    }
    return commit


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class _Refused(Exception):
    """An answer other than success. ``code`` is what the client tells missing, gated and unknown apart by."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: LoopbackHub

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the name service who 127.0.0.1 is
        self.server_name, self.server_port = cast("tuple[str, int]", self.server_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


_routes: list[tuple[list[str], re.Pattern[str], Callable[..., None]]] = []


def _route(methods: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        _routes.append((methods.split(), re.compile(pattern), function))
        return function

    return register


_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"
_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.hub, self.store = self.server.hub, self.server.hub.store

    def log_message(self, format: str, *args: Any) -> None:
        pass  # hub.requests is the log

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._incoming()
        self.request_log = Request(self.command, unquote(url.path), self.headers.get("Range", ""))
        self.hub.requests.append(self.request_log)
        self.cut_after = None
        try:
            if fault := self.hub.next_fault(self.request_log):
                self.cut_after = fault.cut_after
                if fault.hang is not None:
                    self.hub.closing.wait(fault.hang)
                    return self._break()
                if fault.status is not None:
                    raise _Refused(fault.status, "a fault of this loopback hub")
            # a web page could resolve its own name to 127.0.0.1 and read from here
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                raise _Refused(403, "only for 127.0.0.1")
            for methods, pattern, function in _routes:
                if self.command in methods and (match := pattern.fullmatch(url.path)):
                    groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    return function(self, **groups)
            raise _Refused(404, f"the loopback hub has no {self.command} {url.path}")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._json({"error": refused.message, **refused.more}, refused.status, headers)
        except (KeyError, TypeError, ValueError) as error:
            self._json({"error": f"the loopback hub does not understand this request: {error!r}"}, 400)
        finally:
            for _ in self.body:  # the next request on this connection starts after it
                pass

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _dispatch

    def _incoming(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read(min(left, _CHUNK))
            if not chunk:
                return
            left -= len(chunk)
            yield chunk

    def _posted(self) -> Any:
        return json.loads(b"".join(self.body) or b"{}")

    def _json(self, data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(data).encode()
        self._answer(status, io.BytesIO(body), len(body), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: BinaryIO, length: int, headers: Mapping[str, str]) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = length if self.cut_after is None else min(length, self.cut_after)
        while left and (chunk := body.read(min(left, _CHUNK))):
            left -= len(chunk)
            self.wfile.write(chunk)
        if self.cut_after is not None:
            self._break()

    def _break(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # who may do what

    def _user(self) -> str | None:
        """The user's name, or None without a token."""
        if self.hub.tokens is None:
            return OWNER
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.tokens.get(header.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def _owns(self, repo: str) -> bool:
        user = self._user()  # a wrong token is refused in any case
        return self.hub.tokens is None or user == repo.split("/")[0]

    def _writer(self, repo: str) -> str:
        """The user's name, if they may write to the namespace."""
        user = self._user()
        if user is None or not self._owns(repo):
            raise _Refused(401 if user is None else 403, f"You don't have the rights to write to {repo.split('/')[0]}")
        return user

    def _read(self, kind: str, repo: str) -> dict[str, Any]:
        """The record of a repository that the user may see."""
        record = self.store.read(kind, repo) if _is_name(repo) else None
        if record is None or (record["private"] and not self._owns(repo)):
            raise _Refused(404 if self._user() else 401, f"Repository not found: {repo}", "RepoNotFound")
        return record

    @contextlib.contextmanager
    def _change(self, kind: str, repo: str) -> Generator[tuple[dict[str, Any], str]]:
        """The record, written back at the end, and who changes it."""
        with self.store.lock():
            record = self._read(kind, repo)
            yield record, self._writer(repo)
            self.store.write(kind, repo, record)

    def _commit(self, record: dict[str, Any], revision: str | None) -> str:
        """The commit of a branch, a tag or a commit hash."""
        revision = revision or "main"
        commit = record["branches"].get(revision) or record["tags"].get(revision) or revision
        if commit not in record["commits"]:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # the account

    @_route("GET", "/api/whoami-v2")
    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        token = {"displayName": "loopback", "role": "write"}
        self._json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    # repositories

    @_route("POST", "/api/repos/create")
    def _create(self) -> None:
        asked = self._posted()
        repo = f"{asked.get('organization') or self._user()}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        if not _is_name(repo):
            raise _Refused(400, f"Invalid repository name: {repo}")
        user = self._writer(repo)
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo}"
        with self.store.lock():
            if self.store.read(kind, repo) is not None:
                raise _Refused(409, "You already created this repo", url=url)
            record = new_repository(asked.get("visibility") == "private" or bool(asked.get("private")))
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES)
            files = {".gitattributes": self.store.add(attributes.encode(), lfs=False)}
            record["branches"]["main"] = add_commit(record, files, "initial commit", user, None)
            self.store.write(kind, repo, record)
        self._json({"url": url, "name": repo})

    @_route("DELETE", "/api/repos/delete")
    def _delete(self) -> None:
        asked = self._posted()
        repo = f"{asked.get('organization') or self._user()}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        with self.store.lock():
            self._read(kind, repo)
            self._writer(repo)
            self.store.record(kind, repo).unlink()
        self._json({})

    @_route("PUT", _REPO + "/settings")
    def _settings(self, kind: str, repo: str) -> None:
        asked = self._posted()
        with self._change(kind, repo) as (record, _):
            record["gated"] = asked.get("gated", record["gated"])
            record["private"] = asked.get("visibility", "private" if record["private"] else "public") == "private"
        self._json({"gated": record["gated"], "private": record["private"]})

    @_route("GET", "/api/(?P<kind>models|datasets|spaces)")
    def _list(self, kind: str) -> None:
        author, words = self.query.get("author", [""])[0], self.query.get("search", [])
        found: list[dict[str, Any]] = []
        for repo in self.store.list(kind):
            record = self.store.read(kind, repo)
            if record is None or (record["private"] and not self._owns(repo)):
                continue
            if repo.startswith(f"{author}/" if author else "") and all(w.lower() in repo.lower() for w in words):
                found.append(self._describe(repo, record, record["branches"]["main"]))
        self._json(found[: int(self.query.get("limit", ["1000"])[0])])

    @_route("GET", _REPO + "(?:/revision/(?P<revision>[^/]+))?")
    def _info(self, kind: str, repo: str, revision: str | None) -> None:
        record = self._read(kind, repo)
        commit = self._commit(record, revision)
        files = record["commits"][commit]["files"]
        answer = self._describe(repo, record, commit)
        answer["siblings"] = [{"rfilename": path} for path in files]
        if "blobs" in self.query:
            for sibling, entry in zip(answer["siblings"], files.values(), strict=True):
                described = _describe_file(sibling["rfilename"], entry)
                sibling.update(size=entry["size"], blobId=described["oid"])
                if lfs := described.get("lfs"):
                    sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
        self._json(answer)

    def _describe(self, repo: str, record: dict[str, Any], commit: str) -> dict[str, Any]:
        blobs = {e["oid"]: e["size"] for c in record["commits"].values() for e in c["files"].values()}
        return {
            "id": repo,
            "author": repo.split("/")[0],
            "sha": commit,
            "createdAt": record["created"],
            "lastModified": record["commits"][commit]["date"],
            "private": record["private"],
            "gated": record["gated"],
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "usedStorage": sum(blobs.values()),
        }

    @_route("GET", _REPO + "/auth-check(?P<write>/write)?")
    def _auth_check(self, kind: str, repo: str, write: str | None) -> None:
        self._gate(repo, self._read(kind, repo))
        if write:
            self._writer(repo)
        self._json({})

    def _gate(self, repo: str, record: dict[str, Any]) -> None:
        """The Hub shows everybody what a gated repository is, and gives its files only to those who were let in."""
        if record["gated"] and not self._owns(repo):
            message = f"Access to {repo} is restricted and you are not in the authorized list."
            raise _Refused(403 if self._user() else 401, message, "GatedRepo")

    # branches, tags, commits

    @_route("GET", _REPO + "/refs")
    def _refs(self, kind: str, repo: str) -> None:
        record = self._read(kind, repo)
        answer: dict[str, Any] = {"converts": [], "pullRequests": []}
        for name, path in (("branches", "heads"), ("tags", "tags")):
            refs = record[name].items()
            answer[name] = [{"name": n, "ref": f"refs/{path}/{n}", "targetCommit": commit} for n, commit in refs]
        self._json(answer)

    @_route("POST", _REPO + "/branch/(?P<name>[^/]+)")
    def _create_branch(self, kind: str, repo: str, name: str) -> None:
        self._create_ref(kind, repo, "branches", name, self._posted().get("startingPoint"))

    @_route("POST", _REPO + "/tag/(?P<revision>[^/]+)")
    def _create_tag(self, kind: str, repo: str, revision: str) -> None:
        self._create_ref(kind, repo, "tags", self._posted()["tag"], revision)

    def _create_ref(self, kind: str, repo: str, refs: str, name: str, revision: str | None) -> None:
        with self._change(kind, repo) as (record, _):
            if name in record[refs]:
                raise _Refused(409, f"Reference already exists: {name}")
            record[refs][name] = self._commit(record, revision)
        self._json({})

    @_route("DELETE", _REPO + "/(?P<what>branch|tag)/(?P<name>[^/]+)")
    def _delete_ref(self, kind: str, repo: str, what: str, name: str) -> None:
        with self._change(kind, repo) as (record, _):
            if name == "main" or record["branches" if what == "branch" else "tags"].pop(name, None) is None:
                raise _Refused(403 if name == "main" else 404, f"Cannot delete {what} {name}", "RevisionNotFound")
        self._json({})

    @_route("GET", _REPO + "/commits/(?P<revision>[^/]+)")
    def _commits(self, kind: str, repo: str, revision: str) -> None:
        record = self._read(kind, repo)
        commit: str | None = self._commit(record, revision)
        answer: list[dict[str, Any]] = []
        while commit is not None:
            entry = record["commits"][commit]
            about = {name: entry[name] for name in ("title", "message", "date")}
            answer.append({"id": commit, **about, "authors": [{"user": entry["author"]}]})
            commit = entry["parent"]
        self._json(answer)

    # files

    @_route("GET", _REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def _tree(self, kind: str, repo: str, revision: str, path: str | None) -> None:
        record = self._read(kind, repo)
        files = record["commits"][self._commit(record, revision)]["files"]
        prefix = f"{path}/" if path else ""
        below = {name: entry for name, entry in files.items() if name.startswith(prefix)}
        if prefix and not below:
            raise _Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        folders = [name for name in _folders(below) if name.startswith(prefix) and name + "/" != prefix]
        shown = [name for name in folders if deep or "/" not in name[len(prefix) :]]
        answer = [_describe_folder(name, files) for name in shown]
        answer += [_describe_file(n, entry) for n, entry in below.items() if deep or "/" not in n[len(prefix) :]]
        self._json(answer)

    @_route("POST", _REPO + "/paths-info/(?P<revision>[^/]+)")
    def _paths_info(self, kind: str, repo: str, revision: str) -> None:
        raw = b"".join(self.body).decode()
        asked = json.loads(raw)["paths"] if raw.startswith("{") else parse_qs(raw).get("paths", [])
        record = self._read(kind, repo)
        files = record["commits"][self._commit(record, revision)]["files"]
        folders = _folders(files)
        answer = [_describe_file(path, files[path]) for path in asked if path in files]
        answer += [_describe_folder(path, files) for path in asked if path in folders]
        self._json(answer)

    @_route("GET HEAD", _PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def _resolve(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        record = self._read(kind or "models", repo)
        commit = self._commit(record, revision)
        self._gate(repo, record)
        entry = record["commits"][commit]["files"].get(path)
        if entry is None:
            raise _Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        first, end, size = 0, entry["size"], entry["size"]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{entry["oid"]}"',
            "X-Linked-Size": str(size),
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        # of a HEAD request the client wants to know the whole file's size
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")) if self.command == "GET" else None
        if wanted and (wanted[1] or wanted[2]):
            if wanted[1]:
                first, end = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
            else:
                first = max(0, size - int(wanted[2]))
            if first >= end:
                headers["Content-Range"] = f"bytes */{size}"
                return self._answer(416, io.BytesIO(), 0, headers)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        with open(self.store.blob(entry["oid"]), "rb") as file:
            file.seek(first)
            self._answer(206 if "Content-Range" in headers else 200, file, end - first, headers)

    @_route("POST", _REPO + "/preupload/(?P<revision>[^/]+)")
    def _preupload(self, kind: str, repo: str, revision: str) -> None:
        record = self._read(kind, repo)
        self._writer(repo)
        present = record["commits"][self._commit(record, revision)]["files"]
        answer: list[dict[str, Any]] = []
        for file in self._posted()["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            # the client leaves out what has this oid already, so that pushing twice is one commit
            oid = present.get(path, {}).get("oid")
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    @_route("POST", _PAGE + r"\.git/info/lfs/objects/batch")
    def _lfs_batch(self, kind: str | None, repo: str) -> None:
        self._read(kind or "models", repo)
        self._writer(repo)
        objects: list[dict[str, Any]] = []
        for entry in self._posted()["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            # without an action the client knows that the hub has it
            objects.append({**entry, **({} if self.store.blob(entry["oid"]).exists() else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
    def _lfs_put(self, oid: str) -> None:
        if not self.store.add_stream(oid, self.body):
            raise _Refused(400, f"the content's SHA-256 is not {oid}")
        self._json({})

    @_route("POST", _REPO + "/commit/(?P<revision>[^/]+)")
    def _make_commit(self, kind: str, repo: str, revision: str) -> None:
        operations = [json.loads(line) for line in b"".join(self.body).splitlines()]
        if "create_pr" in self.query:
            raise _Refused(400, "the loopback hub has no pull requests")
        header: dict[str, Any] = {}
        with self._change(kind, repo) as (record, user):
            if revision not in record["branches"]:
                raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            parent = record["branches"][revision]
            files = dict(record["commits"][parent]["files"])
            for operation in operations:
                if operation["key"] == "header":
                    header = operation["value"]
                    if header.get("parentCommit", parent) != parent:
                        raise _Refused(412, f"A commit has happened since. {revision} is at {parent}.")
                else:
                    self._apply(operation["key"], operation["value"], files)
            if files != record["commits"][parent]["files"]:
                title, message = header.get("summary", ""), header.get("description", "")
                parent = add_commit(record, dict(sorted(files.items())), title, user, parent, message)
                record["branches"][revision] = parent
        self._json({"success": True, "commitOid": parent, "commitUrl": f"{self.hub.url}/{repo}/commit/{parent}"})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Any]) -> None:
        """One operation of a commit."""
        path = value["path"]
        if any(part in ("", ".", "..") for part in path.rstrip("/").split("/")):
            raise _Refused(400, f"Invalid path: {path}")
        if key == "file":
            files[path] = self.store.add(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            blob = self.store.blob(value["oid"]) if re.fullmatch("[0-9a-f]{64}", value["oid"]) else None
            if blob is None or not blob.exists():
                raise _Refused(400, f"the LFS content of {path} was not uploaded")
            files[path] = {"oid": value["oid"], "size": blob.stat().st_size}
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise _Refused(404, f"{path} does not exist", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise _Refused(400, f"the loopback hub has no operation {key}")

    # collections

    @_route("GET POST", "/api/collections")
    def _collections(self) -> None:
        if self.command == "GET":
            owner = self.query.get("owner", [""])[0]
            found = [c for c in self.store.collections().values() if owner in ("", c["owner"]["name"])]
            found = [c for c in found if not c["private"] or self._owns(c["slug"])]
            return self._json([{name: value for name, value in c.items() if name != "position"} for c in found])
        asked = self._posted()
        name = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        number = hashlib.sha256(json.dumps([asked["namespace"], asked["title"]]).encode()).hexdigest()[:24]
        slug = f"{asked['namespace']}/{name}-{number}"
        self._writer(slug)
        with self.store.lock():
            collections = self.store.collections()
            if slug in collections:
                raise _Refused(409, "You already created this collection", slug=slug)
            collections[slug] = {
                "slug": slug,
                "title": asked["title"],
                "description": asked.get("description"),
                "owner": {"name": asked["namespace"], "type": "user"},
                "items": [],
                "lastUpdated": _now(),
                "position": len(collections),
                "private": bool(asked.get("private")),
                "theme": "blue",
                "upvotes": 0,
            }
            self.store.write_collections(collections)
        self._json(collections[slug])

    @_route("GET PATCH DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)")
    def _collection(self, slug: str) -> None:
        asked: dict[str, Any] = self._posted() if self.command == "PATCH" else {}
        with self.store.lock():
            collections = self.store.collections()
            collection = self._visible(collections, slug)
            if self.command == "GET":
                return self._json(collection)
            self._writer(slug)
            collection.update(asked, lastUpdated=_now())
            if self.command == "DELETE":
                del collections[slug]
            self.store.write_collections(collections)
        self._json({"data": collection})

    @_route("POST DELETE", "/api/collections/(?P<slug>[^/]+/[^/]+)/items(?:/(?P<item>[^/]+))?")
    def _collection_items(self, slug: str, item: str | None) -> None:
        asked = self._posted()
        with self.store.lock():
            collections = self.store.collections()
            collection = self._visible(collections, slug)
            self._writer(slug)
            items = collection["items"]
            if self.command == "DELETE":
                kept = [entry for entry in items if entry["_id"] != item]
                if len(kept) == len(items):
                    raise _Refused(404, f"no item {item}")
                collection["items"] = kept
            else:
                new = asked["item"]
                if any((entry["id"], entry["type"]) == (new["id"], new["type"]) for entry in items):
                    raise _Refused(409, "the item is in the collection")
                number = hashlib.sha256(f"{slug} {new['type']} {new['id']}".encode()).hexdigest()[:24]
                note = {"note": {"text": asked["note"]}} if asked.get("note") else {}
                items.append({"_id": number, "id": new["id"], "type": new["type"], "position": len(items), **note})
            self.store.write_collections(collections)
        self._json(collection)

    def _visible(self, collections: dict[str, dict[str, Any]], slug: str) -> dict[str, Any]:
        collection = collections.get(slug)
        if collection is None or (collection["private"] and not self._owns(slug)):
            raise _Refused(404, f"no collection {slug}")
        return collection


def _is_name(repo: str) -> bool:
    """Whether ``repo`` is namespace/name; it becomes a path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo) is not None and ".." not in repo


def _folders(files: Mapping[str, Any]) -> list[str]:
    return sorted({path.rsplit("/", n)[0] for path in files for n in range(1, path.count("/") + 1)})


def _describe_folder(path: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """A folder in a listing. Its id stands for what is in it."""
    below = {name: entry["oid"] for name, entry in files.items() if name.startswith(f"{path}/")}
    oid = hashlib.sha1(json.dumps(below, sort_keys=True).encode()).hexdigest()
    return {"type": "directory", "path": path, "oid": oid, "size": 0}


def _describe_file(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A file in a listing. In git an LFS file is a small pointer, and that has the git object id."""
    oid, size = entry["oid"], entry["size"]
    if len(oid) == 40:
        return {"type": "file", "path": path, "oid": oid, "size": size}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()
    lfs = {"oid": oid, "size": size, "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "oid": git_blob_id(pointer), "size": size, "lfs": lfs}
