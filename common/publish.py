"""Publishing to the Hugging Face Hub: a checkpoint or model of any run, after the training or during it.

    python -m common push MnistHuggingFaceFlow/42 user/repo

    with common.Publisher(self.push_to, current.checkpoint) as publisher, common.CheckpointManager(...) as checkpoints:
        result = train(config, checkpoints)
        publisher.model(result.path)

What travels is on a list: weights as safetensors (or .keras, .ubj), configurations, tokenizer, image processor, and a
model card that is made here. No pickle, no ``training_args.bin``, no path of this machine. A push is one commit with
the files that differ, and none when nothing does, so it can be repeated at any time.
"""

import contextlib
import hashlib
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from . import hub
from .commands import Checkpoint, Place, export, find, find_one
from .errors import CheckpointError
from .loopback_hub import git_blob_id
from .manifest import FILE_NAME, Manifest, hash_file
from .metaflow_store import Reader, Task
from .policy import KeepBest
from .process import die_with_parent
from .scratch import Scratch
from .tensors import tensors_of, write_safetensors
from .tiny_models import BUILDERS

STRATEGIES = ("end", "every_save", "checkpoint")
LAST_CHECKPOINT = "last-checkpoint"  # the folder in which transformers' hub_strategy="checkpoint" puts it, too
_CARD = "README.md"
_STATE = "state.safetensors"
_WEIGHTS = (".safetensors", ".keras", ".ubj")
_MARKS = ("model_index.json", "adapter_config.json", "config.json")
# what is published of a model besides its weights
_NAMES = re.compile(
    r"model_index\.json|(adapter_|generation_|scheduler_|tokenizer_|(video_)?(pre)?processor_)?config\.json"
    r"|[\w.-]+\.safetensors\.index\.json|(tokenizer|special_tokens_map|added_tokens|vocab)\.json|vocab\.txt|merges\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)|[\w.-]+\.jinja|LICENSE(\.txt|\.md)?|NOTICE"
)
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # "/usr" is a word in some of them
_NEVER = ("training_args.bin", ".lock")
_ORIGINS = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_PLACES = re.compile(r"(path|dir|file|folder|checkpoint)s?$")  # keys that say where something was
_SECRET_KEY = re.compile(r"(^|[_-])(token|secret|password|passwd|api_?key|access_key|credentials?)$", re.IGNORECASE)
_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|ghp_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{12,})")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class About:
    """What the model card says. What is not given is taken from the run, where it is known there.

    Attributes:
        base_model: ``"org/name"`` or ``"org/name@COMMIT"``.
        dataset: its name, or ``"org/name"`` or ``"org/name@COMMIT"`` on the Hub.
        license: an identifier of the Hub, such as ``"apache-2.0"``.
        language: codes such as ``"en"``.
        tags: added to those that are always there.
        task: the pathspec of the Metaflow task that made it.
        step, epoch, metrics, config, environment, resumed_from: as in the checkpoint's manifest.
    """

    base_model: str = ""
    dataset: str = ""
    license: str = ""
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    task: str = ""
    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    resumed_from: Sequence[int] = ()

    def of(self, task: str, manifest: Manifest | None) -> "About":
        """The same with what a checkpoint of the task knows."""
        if manifest is None:
            return replace(self, task=task)
        m = manifest
        base, dataset = _base_of(m.config), _dataset_of(m.config)
        return replace(self, task=task, base_model=self.base_model or base, dataset=self.dataset or dataset,
                       step=m.step, epoch=m.epoch, metrics=m.metrics, config=m.config, environment=m.environment,
                       resumed_from=m.resumed_from)  # fmt: skip


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo, url, commit: where it is; ``commit`` is the tip of main, made by this push or not.
        private: whether the repository is.
        files: what the repository got; empty when it had everything already.
        what: what was pushed, for people.
    """

    repo: str
    url: str
    commit: str
    private: bool
    files: list[str]
    what: str = ""


# ------------------------------------------------------------ what is pushed


def push_target(
    target: str, repo: str, about: About | None = None, *, private: bool = True, checkpoint: bool = False,
    message: str = "",
) -> Pushed:  # fmt: skip
    """Push what ``target`` names to the main branch of ``repo``, which is made when missing.

    Args:
        target: as for the other commands: ``Flow/run[/step[/task]]`` is the model that the run saved with
            ``current.model.save`` or, if it has none, its newest checkpoint; ``...@STEP``, ``...@NAME`` and
            ``...@latest`` a checkpoint, ``...@LABEL`` a model by its label; a directory of checkpoints.
        about: what the run does not know.
        private: what a new repository becomes. A public one is refused.
        checkpoint: put the whole checkpoint, with the optimizer's state, into the folder ``last-checkpoint``.
        message: of the commit.

    Raises:
        HubError: see :func:`push`.
        CheckpointError: the target names nothing, or several.
        InvalidCheckpoint: a file is damaged.
    """
    check_repo(repo)
    about = about or About()
    with _scratch() as scratch:
        model = _model_of(target)
        if model is None:
            place, item = find_one(target)
            return _push_checkpoint(place, item, repo, about, scratch, private, checkpoint, message)
        task, files = model["pathspec"], scratch.directory()
        _Models().extract(model, files)
        said: dict[str, Any] = model.get("metadata") or {}  # current.model.save(..., metadata={"base_model": ...})
        about = replace(
            about, base_model=about.base_model or _base_of(said), dataset=about.dataset or _dataset_of(said)
        )
        return _push_model(files, task, repo, about, scratch, private, checkpoint, message)


def _push_checkpoint(
    place: Place, item: Checkpoint, repo: str, about: About, scratch: Scratch, private: bool, whole: bool, message: str
) -> Pushed:
    task = "" if item.attempt is None else item.task  # of a directory the name stays here
    files = scratch.directory()
    export(place, item, files, "files", "model", lambda _: None)
    what = item.label + (f" of {task}" if task else "")
    about = about.of(task, item.manifest)
    return push(files, repo, about, private=private, checkpoint=files if whole else None, message=message, what=what)


def _push_model(
    files: Path, task: str, repo: str, about: About, scratch: Scratch, private: bool, whole: bool, message: str
) -> Pushed:
    """A model with what the checkpoints of its task (or directory) know."""
    try:
        place, found = find(task)
    except CheckpointError:  # a model that was saved without checkpoints
        place, found = None, list[Checkpoint]()
    found = [item for item in found if item.manifest and not item.fault]
    item = _equal_to(files, found, place) if place and found else None
    whole_files = scratch.directory() if whole else None
    if whole_files is not None:
        if place is None or not found:
            raise CheckpointError(f"{task or 'the directory'} has no valid checkpoint to push with the model")
        export(place, found[-1], whole_files, "files", "model", lambda _: None)
    named = "" if Path(task).is_absolute() else task
    about = about.of(named, item.manifest if item else None)
    what = f"the model of {named}" if named else "the model"
    return push(files, repo, about, private=private, checkpoint=whole_files, message=message, what=what)


def _equal_to(files: Path, found: list[Checkpoint], place: Place) -> Checkpoint:
    """The checkpoint with the weights of this model; else the best by the manager's rule, or the newest."""
    weights = {path.name: hash_file(path) for path in sorted(files.rglob("*.safetensors"))}
    for item in reversed(found):
        theirs = {name: info for name, info in cast("Manifest", item.manifest).files.items() if name in weights}
        if theirs and theirs == weights:
            return item
    events = place.events.get(found[-1].task, [])
    rules = [event["keep_best"] for event in events if event["event"] == "started" and event.get("keep_best")]
    ranked = KeepBest(*rules[-1]).rank([item.entry for item in found]) if rules else []
    best = [item for item in found if ranked and item.entry == ranked[0]]
    return best[0] if best else found[-1]


class _Models(Reader):
    """The models that tasks saved with ``current.model.save``."""

    def of(self, pathspec: str) -> list[dict[str, Any]]:
        """Their records, oldest first."""
        paths = [path for path in self._walk([f"mf.models/models/metadata/{pathspec}"]) if path.endswith(".metadata")]
        records: list[dict[str, Any]] = [json.loads(text) for text in self.texts(paths).values()]
        return sorted(records, key=lambda record: (record["attempt"], record["created_on"]))

    def extract(self, record: dict[str, Any], directory: Path) -> None:
        """Put a model's files into an empty directory. A tar can neither write outside of it nor make links."""
        if record["storage_format"] != "tar":
            links = Path(tempfile.mkdtemp(dir=directory.parent))
            cast("Any", import_module("metaflow")).load_model(record, str(links))
            _copy({str(path.relative_to(links)): path for path in links.rglob("*") if path.is_file()}, directory)
            return
        with self._backend.load_bytes([record["key"]]) as found:
            for _, path, _ in cast("Iterable[Any]", found):
                if path is None:
                    raise CheckpointError(f"the model {record['key']} is not in {self.where} any more")
                with tarfile.open(path) as tar:
                    for member in (member for member in tar if member.isfile()):
                        name = member.name.lstrip("/")
                        if ".." in Path(name).parts:
                            raise CheckpointError(f"the model has a file {member.name!r} outside of its directory")
                        target = directory / name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with open(target, "xb") as file:
                            shutil.copyfileobj(cast("Any", tar.extractfile(member)), file)


def _model_of(target: str) -> dict[str, Any] | None:
    """The record of the model that ``target`` names; None when it names a checkpoint."""
    pathspec, _, which = target.partition("@")
    parts = pathspec.split("/")
    if (
        which.isdigit() or which == "latest" or not 2 <= len(parts) <= 4 or Path(target).expanduser().is_dir()
        or not all(re.fullmatch(r"\w[\w.:-]*", part) for part in parts)
    ):  # fmt: skip
        return None
    newest = {(record["pathspec"], _label(record)): record for record in _Models().of(pathspec)}
    chosen = {key: record for key, record in newest.items() if which in ("", key[1])}
    if len(chosen) > 1:
        there = ", ".join(sorted(f"{task}@{label}" for task, label in chosen)[:6])
        raise CheckpointError(f"{target} names {len(chosen)} models: write which one, of {there}")
    return next(iter(chosen.values()), None)


def _label(record: Mapping[str, Any]) -> str:
    return str(record["model_uuid"]).rpartition("_")[0]


@contextlib.contextmanager
def _scratch() -> Generator[Scratch]:
    scratch = Scratch(Path(tempfile.gettempdir(), f"metaflow-publish-{os.getuid()}"))
    try:
        yield scratch
    finally:
        scratch.remove()


# ------------------------------------------------------------ one push


def push(
    directory: str | os.PathLike[str],
    repo: str,
    about: About | None = None,
    *,
    private: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    message: str = "",
    what: str = "the model",
) -> Pushed:
    """Push a directory with a model, or a checkpoint, to the main branch of ``repo``, in one commit.

    Weights and configurations of an earlier push that are not in this one are deleted; all other files stay.

    Args:
        directory: with the files of ``save_pretrained``, a ``TrainState`` or a model in safetensors; or a file.
        repo: ``user/name``; names under ``local/`` are on the loopback hub.
        about: for the model card.
        private: what a new repository becomes. One that is public already is refused.
        checkpoint: a directory that becomes ``last-checkpoint``, as a whole.
        message: of the commit.
        what: for the message, and for people.

    Raises:
        HubError: no token, no permission, a wrong name, a public repository, somebody else pushed meanwhile, the
            Hub cannot be reached.
        CheckpointError: there is nothing to publish, or it names a path of this machine or holds a secret.
    """
    check_repo(repo)
    with _scratch() as scratch, _errors(repo):
        staged = _stage(Path(directory), scratch.directory(), repo, about or About())
        if checkpoint is not None:
            _stage_checkpoint(Path(checkpoint), staged / LAST_CHECKPOINT)
        _check_secrets(staged)
        return _commit(staged, repo, private, message or f"Push {what}", what)


def check_repo(repo: str) -> None:
    """Raise HubError unless ``repo`` can be the name of a repository to push to."""
    if not _REPOSITORY.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise hub.HubError(f"{repo!r} is not the name of a repository. Names look like user/name.")
    if repo in BUILDERS:
        raise hub.HubError(f"{repo} is built on the spot, for everybody. Push to another name, such as {repo}-mine.")


def _commit(staged: Path, repo: str, private: bool, message: str, what: str) -> Pushed:
    library, errors = import_module("huggingface_hub"), cast("Any", import_module("huggingface_hub.errors"))
    api = hub.api(repo)
    timeout: float = library.utils.get_session().timeout.read or 60  # here the client ignores its own
    try:
        info = api.repo_info(repo, timeout=timeout)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # 401: for all that anybody can tell it exists
            raise
        api.create_repo(repo, private=private)
        info = api.repo_info(repo, timeout=timeout)
    url = f"{api.endpoint}/{repo}"
    if private and not info.private:
        raise hub.HubError(
            f"{url} is public, and a push is private unless you say otherwise. Say --public (private=False), make it "
            "private in its settings, or choose another name."
        )
    there = {
        entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for entry in api.list_repo_tree(repo, revision=info.sha, recursive=True)
        if hasattr(entry, "blob_id")
    }
    files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    changed = [name for name, path in files.items() if not _same(path, there.get(name))]
    whole = any(name.startswith(f"{LAST_CHECKPOINT}/") for name in files)
    stale = [name for name in there if name not in files and _is_stale(name, whole)]
    if not changed and not stale:
        return Pushed(repo, url, info.sha, bool(info.private), [], what)
    operations = [library.CommitOperationAdd(name, str(files[name])) for name in changed]
    operations += [library.CommitOperationDelete(name) for name in stale]
    try:
        made = api.create_commit(repo, operations, commit_message=message, parent_commit=info.sha)
    except ValueError as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise
        raise hub.HubError(f"The Hub refuses the model card: {' '.join(str(error).split())}") from error
    return Pushed(repo, url, made.oid, bool(info.private), [*changed, *stale], what)


def _same(path: Path, oid: str | None) -> bool:
    """Whether a file is what the Hub has: by the SHA-256 of an LFS file, by git's SHA-1 of any other."""
    if oid is None:
        return False
    if len(oid) == 40:
        return git_blob_id(path.read_bytes()) == oid
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest() == oid


def _is_stale(name: str, whole: bool) -> bool:
    """Whether a file that this push does not have would spoil it: other weights, another configuration."""
    if name.startswith(f"{LAST_CHECKPOINT}/"):
        return whole
    return "/" not in name and (name.endswith((*_WEIGHTS, ".safetensors.index.json")) or name in _MARKS)


@contextlib.contextmanager
def _errors(repo: str) -> Generator[None]:
    """What hub.clear_errors says of a download, in the words of a push."""
    try:
        with hub.clear_errors(repo):
            yield
    except hub.HubError as error:
        message = _explain(error.__cause__, repo)
        if message is None:
            raise
        raise hub.HubError(message) from error.__cause__


def _explain(error: BaseException | None, repo: str) -> str | None:
    owner = repo.split("/")[0]
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    if type(error).__name__ == "OfflineModeIsEnabled":
        return f"HF_HUB_OFFLINE is set, so nothing can be pushed to {repo}. Unset it and push again."
    if status == 401 and cast("Any", import_module("huggingface_hub")).get_token() is None:
        return (
            f"Pushing to {repo} needs a token with write permission, and no token is set (HTTP 401). Set HF_TOKEN (or "
            "run: hf auth login)."
        )
    if status == 403:
        return (
            f"Your token may not write to {owner} (HTTP 403). Set HF_TOKEN to one with write permission there, or push "
            "to a repository of your own."
        )
    if status in (409, 412):
        return (
            f"Somebody else pushed to {repo} in the meantime, and nothing of this push arrived (HTTP {status}). Look "
            "at it, then push again."
        )
    return None


# ------------------------------------------------------------ a clean folder


def _is_public(path: Path) -> bool:
    """Whether a file is on the list of what travels."""
    return path.name != _STATE and (path.suffix in _WEIGHTS or _NAMES.fullmatch(path.name) is not None)


def _stage(source: Path, staged: Path, repo: str, about: About) -> Path:
    """Copy what is published of a model to an empty directory, clean it, and write its card."""
    if source.is_file():
        files = {source.name: source} if _is_public(source) else {}
    else:
        marks = [path for mark in _MARKS for path in sorted(source.rglob(mark), key=lambda path: len(path.parts))]
        root = marks[0].parent if marks else source
        files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
        files = {name: path for name, path in files.items() if _is_public(path)}
    _copy(files, staged)
    if source.is_dir() and (source / _STATE).is_file() and not files:
        _stage_state(source / _STATE, staged)
    names = [path.relative_to(staged).as_posix() for path in sorted(staged.rglob("*")) if path.is_file()]
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise CheckpointError(
            f"there is nothing to publish for {repo}: no weights as safetensors, .keras or .ubj, and pickles are not "
            "published. Push the model that the run saved with current.model.save: Flow/run"
        )
    if about.config and not any((staged / mark).exists() for mark in _MARKS):
        (staged / "config.json").write_text(json.dumps(_public(about.config), indent=2, sort_keys=True) + "\n")
    base, commit = _split(about.base_model)
    for name in names:
        if name.endswith(".json") and Path(name).name not in _VOCABULARIES:
            _clean(staged / name, name, base, commit)
        if name.endswith(".safetensors"):
            _check_header(staged / name, name)
    adapter = _read_json(staged / "adapter_config.json")
    if adapter and not base:
        about = replace(about, base_model="@".join(filter(None, (adapter["base_model_name_or_path"],
                                                                 adapter.get("revision") or ""))))  # fmt: skip
    (staged / _CARD).write_text(card(staged, repo, about), encoding="utf-8")
    return staged


def _stage_state(state: Path, staged: Path) -> None:
    """The weights of a TrainState under their own names."""
    weights = {name.partition("/")[2]: tensor for name, tensor in tensors_of(state).items() if name[:6] == "model/"}
    if weights:
        write_safetensors(weights, staged / "model.safetensors")


def _stage_checkpoint(source: Path, staged: Path) -> None:
    """A whole checkpoint, with its manifest; only where one of its files had to be cleaned both differ."""
    files = {str(path.relative_to(source)): path for path in sorted(source.rglob("*")) if path.is_file()}
    _copy({name: path for name, path in files.items() if path.name not in (*_NEVER, _CARD)}, staged)
    changed = [
        name for name in files
        if name.endswith(".json") and Path(name).name not in _VOCABULARIES and _clean(staged / name, name, "", "")
    ]  # fmt: skip
    if (staged / FILE_NAME).exists():
        manifest = Manifest.read(staged)
        kept = {name: info for name, info in manifest.files.items() if (staged / name).exists()}
        if changed or len(kept) < len(manifest.files):
            kept |= {name: hash_file(staged / name) for name in changed}
            (staged / FILE_NAME).unlink()
            replace(manifest, files=kept).write(staged)


def _copy(files: Mapping[str, Path], into: Path) -> None:
    for name, path in files.items():
        target = into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _clean(path: Path, name: str, base: str, commit: str) -> bool:
    """Take the paths of this machine out of a JSON file; returns whether there were any.

    Raises CheckpointError where one cannot be taken out.
    """
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    before = json.dumps(content)
    content = _without_paths(content, name, base)
    if Path(name).name == "adapter_config.json" and base:
        content |= {"base_model_name_or_path": base, "revision": commit or None}
    if json.dumps(content) == before:
        return False
    path.unlink()
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return True


def _without_paths(value: Any, where: str, base: str) -> Any:
    if isinstance(value, dict):
        cleaned: dict[str, Any] = {}
        for key, item in cast("dict[str, Any]", value).items():
            if _is_path(key):
                raise CheckpointError(f"{where} names {key}, a path of this machine. Save the model without it.")
            if not _is_path(item):
                cleaned[key] = _without_paths(item, f"{where}: {key}", base)
            elif key in _ORIGINS and base:
                cleaned[key] = base
            elif key == "base_model_name_or_path":
                raise CheckpointError(
                    f"{where} has its base model at {item}, where nobody else finds it. Say which repository it is "
                    "from: --base-model org/name@COMMIT."
                )
            elif not _PLACES.search(key) or where.startswith(FILE_NAME):
                raise CheckpointError(
                    f"{where}: {key} is {item}, a path of this machine, which is not published. Save the model without "
                    "it."
                )
        return cleaned
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if paths := [item for item in items if _is_path(item)]:
            raise CheckpointError(f"{where} names {paths[0]}, a path of this machine. Save the model without it.")
        return [_without_paths(item, where, base) for item in items]
    return value


def _is_path(value: Any) -> bool:
    """Whether it is an absolute path. A short one, such as /think, can be a word as well."""
    if not isinstance(value, str) or "\n" in value or not re.match(r"/|~/|file:/|[A-Za-z]:[\\/]", value):
        return False
    return not value.startswith("/") or len(Path(value).parts) > 2 or (value != "/" and Path(value).exists())


def _check_header(path: Path, name: str) -> None:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for key, value in header.get("__metadata__", {}).items():
        if _is_path(value):
            raise CheckpointError(f"the header of {name} has a path of this machine, {key}: {value}. Save it without.")


def _check_secrets(staged: Path) -> None:
    token: str | None = cast("Any", import_module("huggingface_hub")).get_token()
    for path in staged.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja", ".txt") and path.name not in _VOCABULARIES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if _SECRET.search(text) or (token and token in text):
                raise CheckpointError(f"{path.relative_to(staged)} holds what looks like an access token. Remove it.")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _public(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without paths of this machine and without secrets."""
    public: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            public[key] = _public(cast("dict[str, Any]", value))
        elif not _SECRET_KEY.search(key) and not _SECRET.search(str(value)) and not any(map(_is_path, _flat(value))):
            public[key] = value
    return public


def _flat(value: Any) -> list[Any]:
    return list(cast("Sequence[Any]", value)) if isinstance(value, (list, tuple)) else [value]


# ------------------------------------------------------------ the model card


def card(staged: Path, repo: str, about: About) -> str:
    """The model card of a folder. It has no clock times: the same model has the same card."""
    config, adapter = _read_json(staged / "config.json"), _read_json(staged / "adapter_config.json")
    architecture = next(iter(config.get("architectures") or []), "")
    head = architecture.partition("For")[2]
    if adapter:
        head = _HEADS.get(adapter.get("task_type") or "", "")
    base, base_commit = _split(about.base_model)
    library, load = _how_to_load(staged, repo, head, bool(adapter), architecture, base)
    dataset, dataset_commit = _split(about.dataset)
    data: Any = cast("Any", import_module("huggingface_hub")).ModelCardData(
        license=about.license or None,
        language=list(about.language) or None,
        library_name=library or None,
        pipeline_tag=_TASKS.get(head),
        base_model=base if _REPOSITORY.fullmatch(base) else None,
        datasets=[dataset] if _REPOSITORY.fullmatch(dataset) else None,
        tags=list(dict.fromkeys(["metaflow", *(["lora"] if adapter.get("peft_type") == "LORA" else []), *about.tags])),
    )
    made = "an adapter of" if adapter else "a model trained from"
    lines = ["---", data.to_yaml(), "---", "", f"# {repo.split('/')[1]}", ""]
    kind = f"{made} {_linked(base, base_commit)}" if base else f"a model{f' ({architecture})' if architecture else ''}"
    on = f", trained on {_linked(dataset, dataset_commit, 'datasets/')}" if dataset else ""
    lines.append(f"This is {kind}{on}. The card was made with the model, from what the training recorded.")
    lines += ["", "## How to load it", "", "```python", *load, "```"]
    if about.metrics:
        at = f" at step {about.step}" if about.step is not None else ""
        lines += ["", f"## Metrics{at}", "", *_table("metric", about.metrics)]
    if hyperparameters := _public(about.config):
        lines += ["", "## Hyperparameters", "", *_table("name", hyperparameters)]
    facts: dict[str, Any] = {}
    if about.task:
        facts["Metaflow task"] = f"`{about.task}`"
    if about.step is not None:
        facts["checkpoint"] = f"step {about.step}" + (f", epoch {about.epoch}" if about.epoch is not None else "")
    if about.resumed_from:
        facts["interrupted, and resumed at step"] = ", ".join(map(str, about.resumed_from))
    if base:
        facts["base model"] = f"{base}, " + (f"commit `{base_commit}`" if base_commit else "commit unknown")
    if dataset:
        facts["data set"] = dataset + (f", commit `{dataset_commit}`" if dataset_commit else "")
    facts |= _public(about.environment)
    if facts:
        lines += ["", "## Where it comes from", "", *_table("", facts)]
    return "\n".join(lines) + "\n"


_HEADS = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "FEATURE_EXTRACTION": "FeatureExtraction",
}
_TASKS = {
    "CausalLM": "text-generation",
    "Seq2SeqLM": "translation",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "ImageClassification": "image-classification",
}


def _how_to_load(
    staged: Path, repo: str, head: str, adapter: bool, architecture: str, base: str
) -> tuple[str, list[str]]:
    """The library's name on the Hub, and lines of Python."""
    if adapter or architecture:
        library = "peft" if adapter else "transformers"
        if head not in _TASKS and head != "FeatureExtraction":
            name = "AutoPeftModel" if adapter else "AutoModel"
        else:
            name = f"{'AutoPeftModelFor' if adapter else 'AutoModelFor'}{head}"
        lines, imports = [f'model = {name}.from_pretrained("{repo}")'], [name] if not adapter else []
        for file, loader, variable in (
            ("tokenizer_config.json", "AutoTokenizer", "tokenizer"),
            ("preprocessor_config.json", "AutoImageProcessor", "processor"),
        ):
            if (staged / file).exists():
                imports.append(loader)
                lines.append(f'{variable} = {loader}.from_pretrained("{repo}")')
        if adapter and base and len(lines) == 1 and head == "CausalLM":
            imports.append("AutoTokenizer")  # that of the base model, unchanged
            lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{base}")')
        first = ["from peft import " + name] if adapter else []
        return library, first + ([f"from transformers import {', '.join(imports)}"] if imports else []) + ["", *lines]
    weights = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.suffix in _WEIGHTS)[0]
    library, loader, call = {
        ".keras": ("keras", "import keras", "model = keras.saving.load_model({})"),
        ".ubj": ("xgboost", "import xgboost", "model = xgboost.Booster(model_file={})"),
    }.get(Path(weights).suffix, ("", "from safetensors.torch import load_file", "weights = load_file({})"))
    if (staged / "model_index.json").exists():
        load = f'pipeline = DiffusionPipeline.from_pretrained("{repo}")'
        return "diffusers", ["from diffusers import DiffusionPipeline", "", load]
    call = call.format(f'hf_hub_download("{repo}", "{weights}")')
    return library, ["from huggingface_hub import hf_hub_download", loader, "", call]


def _linked(name: str, commit: str, folder: str = "") -> str:
    if not _REPOSITORY.fullmatch(name) or name.startswith("local/"):
        return name
    return f"[{name}](https://huggingface.co/{folder}{name}{f'/tree/{commit}' if commit else ''})"


def _table(first: str, values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return [f"| {first} | |", "|---|---|", *rows]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _split(name: str) -> tuple[str, str]:
    """``org/name@COMMIT`` in two."""
    name, _, commit = name.partition("@")
    return name, commit


def _base_of(config: Mapping[str, Any]) -> str:
    """The base model that a configuration names, by the keys that trainings use for it."""
    names = [str(config.get(key) or "") for key in ("base_model", "model", "model_id", "model_name", "base")]
    name = next((name for name in names if _REPOSITORY.fullmatch(name)), "")
    keys = [f"{prefix}{word}" for prefix in ("base_model_", "base_", "model_", "") for word in ("commit", "revision")]
    return _with_commit(name, config, keys) if name else ""


def _dataset_of(config: Mapping[str, Any]) -> str:
    name = config.get("dataset") or config.get("dataset_name") or ""
    if not isinstance(name, str) or _is_path(name):
        return ""
    keys = ["dataset_commit", "dataset_revision", *([] if _base_of(config) else ["commit", "revision"])]
    return _with_commit(name, config, keys)


def _with_commit(name: str, config: Mapping[str, Any], keys: Sequence[str]) -> str:
    commits = [str(config[key]) for key in keys if _COMMIT.fullmatch(str(config.get(key) or ""))]
    return f"{name}@{commits[0]}" if commits else name


# ------------------------------------------------------------ during the training


class Publisher:
    """Pushes to the Hub while a training runs, from a process of its own. Use it around the CheckpointManager.

    That process looks at the training's checkpoints from outside, as ``python -m common`` does, and pushes the newest
    one that the manager has committed. While it pushes, newer ones replace each other. The training never waits for it
    and gets no error of it: one line says that a push failed and one that it went through again. Like the task it dies
    with the machine, and the retry's goes on: what the Hub has already makes no commit.

    Args:
        repo: ``user/name``, or ``""``: nothing is pushed.
        place: what the manager got: ``current.checkpoint``, or a directory.
        strategy: as ``hub_strategy`` in TrainingArguments. ``"end"``: the model, after the training.
            ``"every_save"``: also each checkpoint's model, and with ``"checkpoint"`` also the whole newest checkpoint,
            in the folder ``last-checkpoint``.
        private: what a new repository becomes. A public one is refused.
        interval: seconds between two looks at the checkpoints.
        timeout: seconds that the Hub may take for a part of an answer before an attempt counts as failed.
        patience: seconds that the end of the ``with`` block waits for the last push, at most.
        about: see :class:`About`: base_model, dataset, license, language, tags.

    Raises:
        HubError: ``repo`` is no name of a repository.
        CheckpointError: the strategy is unknown, or there is no place.
    """

    def __init__(
        self,
        repo: str,
        place: Any = None,
        *,
        strategy: str = "every_save",
        private: bool = True,
        interval: float = 30,
        timeout: float = 60,
        patience: float = 60,
        **about: Any,
    ) -> None:
        if strategy not in STRATEGIES:
            raise CheckpointError(f"strategy is {strategy!r}: choose one of {', '.join(STRATEGIES)}")
        if repo:
            check_repo(repo)
        self._repo, self._place, self._patience = repo, place, patience
        self._order: dict[str, Any] = {"repo": repo, "strategy": strategy, "private": private, "interval": interval,
                                       "timeout": timeout, "about": asdict(About(**about))}  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._model = ""
        self._failure = ""
        self._complete = False
        self._finished = threading.Event()

    def __enter__(self) -> "Publisher":
        if self._repo:
            if self._place is None:
                raise CheckpointError("Publisher needs the place of the checkpoints: give current.checkpoint")
            is_path = isinstance(self._place, (str, os.PathLike))
            self._target = str(self._place) if is_path else Task.from_environment().pathspec
            self._order["target"] = str(Path(self._target).absolute()) if is_path else self._target
            if self._order["strategy"] != "end":
                self._start()
        return self

    def model(self, path: str | os.PathLike[str]) -> None:
        """The trained model, which is pushed at the end of the ``with`` block."""
        self._model = str(Path(path).absolute())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if not self._repo:
            return
        try:
            if kind is None:
                self._finish()
        except Exception as failure:  # of pipes and processes: not the training's business
            print(f"[publish] {type(failure).__name__}: {failure}", flush=True)
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    @property
    def command(self) -> str:
        """The command that pushes what was not pushed."""
        about: dict[str, Any] = {name: value for name, value in self._order["about"].items() if value}
        public, whole = not self._order["private"], self._order["strategy"] == "checkpoint"
        if not Path(__file__).with_name("__main__.py").exists():  # a copied project has no command line
            call = f"push_target({self._target!r}, {self._repo!r}, About(**{about!r}), private={not public}, "
            code = f"from {__package__}.publish import *; print({call}checkpoint={whole}))"
            return shlex.join(["python", "-c", code])
        options: list[str] = []
        for name, value in about.items():
            option = "--tag" if name == "tags" else f"--{name.replace('_', '-')}"
            options += [word for item in _flat(value) for word in (option, item)]
        options += ["--public"] * public + ["--with-checkpoint"] * whole
        return shlex.join(["python", "-m", __package__ or "common", "push", self._target, self._repo, *options])

    def _finish(self) -> None:
        if self._process is None:
            self._start()
        self._tell({"final": self._model})
        answered = self._finished.wait(self._patience)
        if not self._complete:
            why = self._failure if answered else f"no end after {self._patience:g} s"
            what = "The model" if self._model else "The newest checkpoint"
            print(f"[publish] {what} is not on {self._repo} ({why}). Push it later: {self.command}", flush=True)

    def _start(self) -> None:
        here = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(dict.fromkeys([*(entry or str(Path.cwd()) for entry in sys.path), here]))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.publish", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is the training's
        )  # fmt: skip
        self._tell(self._order)
        threading.Thread(target=self._listen, name="publisher", daemon=True).start()

    def _tell(self, line: Mapping[str, Any]) -> None:
        process = cast("subprocess.Popen[str]", self._process)
        with contextlib.suppress(BrokenPipeError):  # it ended; _listen says so
            cast("Any", process.stdin).write(json.dumps(line) + "\n")
            cast("Any", process.stdin).flush()

    def _listen(self) -> None:
        process = cast("subprocess.Popen[str]", self._process)
        try:
            for line in cast("Any", process.stdout):
                self._hear(json.loads(line))
        finally:
            self._failure = self._failure or "its process ended early"
            self._finished.set()

    def _hear(self, news: dict[str, Any]) -> None:
        if "failed" in news:
            if not self._failure and not news["final"]:
                problem = f"{news['what']} could not be pushed: {news['failed']}"
                print(f"[publish] {problem} The training goes on.", flush=True)
            self._failure = news["failed"]
        else:
            again = " again" if self._failure else ""
            self._failure = ""
            did = f"is on {self._repo}{again}" if news["new"] or again else f"was on {self._repo} already"
            print(f"[publish] {news['what']} {did} (commit {news['commit'][:8]})", flush=True)
        if news["final"]:
            self._complete = "failed" not in news
            self._finished.set()


def _background(orders: "queue.SimpleQueue[dict[str, Any] | None]", report: Callable[[dict[str, Any]], None]) -> None:
    """The process of a Publisher: push what is new, until told to push what is final."""
    order = cast("dict[str, Any]", orders.get())
    repo, about, interval = order["repo"], About(**order["about"]), order["interval"]
    options: tuple[Any, ...] = (order["private"], order["strategy"] == "checkpoint", "")
    wait: float | None = None if order["strategy"] == "end" else 0.0
    ready = False
    key, done, failures = "", cast("Pushed | None", None), 0  # the checkpoint that was pushed last
    while True:
        told: dict[str, Any] | None = {}
        with contextlib.suppress(queue.Empty):
            told = orders.get(timeout=wait)
        if told is None:
            return
        what, wait = "the model" if told.get("final") else "a checkpoint", interval
        try:
            if not ready:
                set_up_client(repo, timeout=order["timeout"])
                ready = True
            newest = None if told.get("final") else _newest(order["target"])
            with _scratch() as scratch:
                if told.get("final"):
                    done = _push_model(Path(told["final"]), order["target"], repo, about, scratch, *options)
                elif newest is None:
                    if told:
                        raise CheckpointError(f"there is no checkpoint of {order['target']}")
                    continue
                elif newest[1].entry.key != key:
                    what = newest[1].label
                    done = _push_checkpoint(*newest, repo, about, scratch, *options)
                    key = newest[1].entry.key
                elif not told:
                    continue
            pushed = cast("Pushed", done)
            report({"what": pushed.what, "new": bool(pushed.files), "commit": pushed.commit, "final": bool(told)})
        except Exception as error:
            known = isinstance(error, (hub.HubError, CheckpointError))
            text = str(error) if known else "".join(traceback.format_exception_only(error)).strip()
            report({"failed": text.rstrip(".") + ".", "what": what, "final": bool(told)})
            failures = failures + 1
            wait = min(interval * 2**failures, max(interval, 600.0))
        else:
            failures = 0
        if told:
            return


def _newest(target: str) -> tuple[Place, Checkpoint] | None:
    try:
        place, found = find(target)
    except CheckpointError:
        return None  # there is none yet
    whole = [item for item in found if item.manifest and not item.fault]
    return (place, whole[-1]) if whole else None


def set_up_client(repo: str, *, timeout: float, progress: bool = False) -> None:
    """Let this process's Hub client give up after so many seconds without an answer; by itself it waits for ever."""
    check_repo(repo)
    with _errors(repo):
        hub.api(repo)  # for names under local/ it brings a client of its own
    library: Any = import_module("huggingface_hub")
    http: Any = import_module("huggingface_hub.utils._http")
    factory = http._GLOBAL_CLIENT_FACTORY

    def client() -> Any:
        made = factory()
        made.timeout = timeout
        return made

    library.set_client_factory(client)
    if not progress:
        library.utils.disable_progress_bars()


def main() -> None:
    """``python -m common.publish PARENT``: started by a Publisher. Orders and news are lines of JSON."""
    die_with_parent(int(sys.argv[1]))
    os.nice(10)  # the training keeps the cores
    news = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def report(line: dict[str, Any]) -> None:
        news.write(json.dumps(line) + "\n")
        news.flush()

    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    _background(orders, report)


if __name__ == "__main__":
    main()
