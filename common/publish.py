"""Publishing to the Hugging Face Hub: a checkpoint or model of any run.

    python -m common push MnistHuggingFaceFlow/42 user/repo

What travels is on a list: weights as safetensors (or .keras, .ubj), configurations, tokenizer, image processor, and a
model card that is made here. No pickle, no ``training_args.bin``, no path of this machine. A push is one commit with
the files that differ, and none when nothing does, so it can be repeated at any time.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from . import hub
from .commands import Checkpoint, Place, export, find, find_one, rule_of
from .errors import CheckpointError
from .loopback_hub import git_blob_id
from .manifest import FILE_NAME, Manifest, hash_file
from .metaflow_store import Reader
from .model_card import REPOSITORY, WEIGHTS, About, base_of, card, dataset_of, read_json, split_commit
from .redact import PLACES, SECRET, is_path, public
from .scratch import Scratch
from .tensors import tensors_of, write_safetensors
from .tiny_models import BUILDERS

LAST_CHECKPOINT = "last-checkpoint"  # the folder in which transformers' hub_strategy="checkpoint" puts it, too
_CARD = "README.md"
_STATE = "state.safetensors"
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
    with new_scratch() as scratch:
        model = _model_of(target)
        if model is None:
            place, item = find_one(target)
            return push_checkpoint(place, item, repo, about, scratch, private, checkpoint, message)
        task, files = model["pathspec"], scratch.directory()
        _Models().extract(model, files)
        said: dict[str, Any] = model.get("metadata") or {}  # current.model.save(..., metadata={"base_model": ...})
        about = replace(about, base_model=about.base_model or base_of(said), dataset=about.dataset or dataset_of(said))
        return push_model(files, task, repo, about, scratch, private, checkpoint, message)


def push_checkpoint(
    place: Place, item: Checkpoint, repo: str, about: About, scratch: Scratch, private: bool, whole: bool, message: str
) -> Pushed:
    task = "" if item.attempt is None else item.task  # of a directory the name stays here
    files = scratch.directory()
    export(place, item, files, "files", "model", lambda _: None)
    what = item.label + (f" of {task}" if task else "")
    about = about.of(task, item.manifest)
    return push(files, repo, about, private=private, checkpoint=files if whole else None, message=message, what=what)


def push_model(
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
    rule = rule_of(place, found[-1].task)
    ranked = rule.rank([item.entry for item in found]) if rule else []
    best = [item for item in found if ranked and item.entry == ranked[0]]
    return best[0] if best else found[-1]


class _Models(Reader):
    """The models that tasks saved with ``current.model.save``."""

    def of(self, pathspec: str) -> list[dict[str, Any]]:
        """Their records, oldest first."""
        paths = [path for path in self.walk([f"mf.models/models/metadata/{pathspec}"]) if path.endswith(".metadata")]
        records: list[dict[str, Any]] = [json.loads(text) for text in self.texts(paths).values()]
        return sorted(records, key=lambda record: (record["attempt"], record["created_on"]))

    def extract(self, record: dict[str, Any], directory: Path) -> None:
        """Put a model's files into an empty directory. A tar can neither write outside of it nor make links."""
        if record["storage_format"] != "tar":
            links = Path(tempfile.mkdtemp(dir=directory.parent))
            cast("Any", import_module("metaflow")).load_model(record, str(links))
            _copy({str(path.relative_to(links)): path for path in links.rglob("*") if path.is_file()}, directory)
            return
        with self.backend.load_bytes([record["key"]]) as found:
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
def new_scratch() -> Generator[Scratch]:
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
    with new_scratch() as scratch, _errors(repo):
        staged = _stage(Path(directory), scratch.directory(), repo, about or About())
        if checkpoint is not None:
            _stage_checkpoint(Path(checkpoint), staged / LAST_CHECKPOINT)
        _check_secrets(staged)
        return _commit(staged, repo, private, message or f"Push {what}", what)


def check_repo(repo: str) -> None:
    """Raise HubError unless ``repo`` can be the name of a repository to push to."""
    if not REPOSITORY.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
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
    return "/" not in name and (name.endswith((*WEIGHTS, ".safetensors.index.json")) or name in _MARKS)


@contextlib.contextmanager
def _errors(repo: str) -> Generator[None]:
    """What hub.clear_errors says of a download, in the words of a push."""
    try:
        with hub.clear_errors(repo):
            yield
    except hub.HubError as error:
        message = _explain(error.__context__, repo)
        if message is None:
            raise
        raise hub.HubError(message) from None


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
    return path.name != _STATE and (path.suffix in WEIGHTS or _NAMES.fullmatch(path.name) is not None)


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
    if not any(name.endswith(WEIGHTS) for name in names):
        raise CheckpointError(
            f"there is nothing to publish for {repo}: no weights as safetensors, .keras or .ubj, and pickles are not "
            "published. Push the model that the run saved with current.model.save: Flow/run"
        )
    if about.config and not any((staged / mark).exists() for mark in _MARKS):
        (staged / "config.json").write_text(json.dumps(public(about.config), indent=2, sort_keys=True) + "\n")
    base, commit = split_commit(about.base_model)
    for name in names:
        if name.endswith(".json") and Path(name).name not in _VOCABULARIES:
            _clean(staged / name, name, base, commit)
        if name.endswith(".safetensors"):
            _check_header(staged / name, name)
    adapter = read_json(staged / "adapter_config.json")
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
            if is_path(key):
                raise CheckpointError(f"{where} names {key}, a path of this machine. Save the model without it.")
            if not is_path(item):
                cleaned[key] = _without_paths(item, f"{where}: {key}", base)
            elif key in _ORIGINS and base:
                cleaned[key] = base
            elif key == "base_model_name_or_path":
                raise CheckpointError(
                    f"{where} has its base model at {item}, where nobody else finds it. Say which repository it is "
                    "from: --base-model org/name@COMMIT."
                )
            elif not PLACES.search(key) or where.startswith(FILE_NAME):
                raise CheckpointError(
                    f"{where}: {key} is {item}, a path of this machine, which is not published. Save the model without "
                    "it."
                )
        return cleaned
    if isinstance(value, list):
        items = cast("list[Any]", value)
        if paths := [item for item in items if is_path(item)]:
            raise CheckpointError(f"{where} names {paths[0]}, a path of this machine. Save the model without it.")
        return [_without_paths(item, where, base) for item in items]
    return value


def _check_header(path: Path, name: str) -> None:
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for key, value in header.get("__metadata__", {}).items():
        if is_path(value):
            raise CheckpointError(f"the header of {name} has a path of this machine, {key}: {value}. Save it without.")


def _check_secrets(staged: Path) -> None:
    token: str | None = cast("Any", import_module("huggingface_hub")).get_token()
    for path in staged.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja", ".txt") and path.name not in _VOCABULARIES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if SECRET.search(text) or (token and token in text):
                raise CheckpointError(f"{path.relative_to(staged)} holds what looks like an access token. Remove it.")


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
