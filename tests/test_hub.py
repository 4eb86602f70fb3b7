"""The hub: the loopback server with the real client, pinned downloads with real flows, and what to do when it fails."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from gallery import REPO, Example, run_flow

from common import hub as hub_module
from common import tiny_models
from common.hub import HubError, clear_errors, private_copy, resolve, verify
from common.loopback_hub import LoopbackHub

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the environment has no Hub client")
from huggingface_hub import HfApi, constants, errors  # noqa: E402

TESTS = Example(REPO / "tests")
WEIGHTS = hashlib.shake_256(b"weights").digest(300_000)
TINY = "local/tiny-llama-chat"


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """The client of this process may talk to 127.0.0.1, has no token and a cache of its own."""
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_TOKEN_PATH", str(tmp_path / "token"))):
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub_module, "_local_hub", None)
    hub_module.allow_loopback()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, which common.hub takes for the real one."""
    with LoopbackHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(hub_module, "endpoint", lambda repo_id: hub.url)
        yield hub


@pytest.fixture
def secured(tmp_path, monkeypatch):
    """A hub with two users."""
    with LoopbackHub(tmp_path / "secured", tokens={"hf_ann": "ann", "hf_ben": "ben"}) as hub:
        monkeypatch.setattr(hub_module, "endpoint", lambda repo_id: hub.url)
        yield hub


def fill(directory: Path, version: int) -> None:
    """A repository with regular and LFS files and folders."""
    (directory / "folder/deep").mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"version": version}))
    (directory / "folder/deep/vocab.json").write_text(json.dumps({"version": version}))
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    (directory / "README.md").write_text("about")


def publish(hub: LoopbackHub, directory: Path, repo: str = "org/model") -> tuple[HfApi, str, str]:
    """A repository with two commits, the first of which is tagged v1."""
    api = HfApi(endpoint=hub.url)
    api.create_repo(repo, exist_ok=True)
    commits = []
    for version in (1, 2):
        fill(directory, version)
        commits.append(api.upload_folder(repo_id=repo, folder_path=directory).oid)
        if version == 1:
            api.create_tag(repo, tag="v1")
    return api, *commits


# the server with the real client


def test_upload_and_download(hub, tmp_path):
    api, first, second = publish(hub, tmp_path / "made")
    assert api.repo_info("org/model", revision="v1").sha == first != second == api.repo_info("org/model").sha
    assert all(len(commit) == 40 for commit in (first, second))
    whole = Path(api.snapshot_download("org/model"))
    assert (whole / "model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((whole / "folder/deep/vocab.json").read_text()) == {"version": 2}
    some = Path(api.snapshot_download("org/model", revision="v1", allow_patterns="*.json"))
    assert sorted(path.name for path in some.rglob("*.*")) == ["config.json", "vocab.json"]
    assert json.loads(Path(api.hf_hub_download("org/model", "config.json", revision=first)).read_text()) == {
        "version": 1
    }
    assert hub.count("PUT /lfs/") == 1, "the same LFS content travels once"
    assert api.file_exists("org/model", "config.json") and not api.file_exists("org/model", "nothing.json")
    with pytest.raises(errors.EntryNotFoundError):
        api.hf_hub_download("org/model", "nothing.json")


def test_listings(hub, tmp_path):
    api, first, second = publish(hub, tmp_path / "made")
    api.create_repo("org/empty", repo_type="dataset")
    assert [info.id for info in api.list_models()] == ["org/model"]
    assert [info.id for info in api.list_models(author="org", search="MOD")] == ["org/model"]
    assert not list(api.list_models(author="or")) and not list(api.list_models(search="else"))
    assert [info.id for info in api.list_datasets()] == ["org/empty"]
    info = api.model_info("org/model", files_metadata=True)
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings}
    assert sizes["model.safetensors"] == len(WEIGHTS) and sizes["README.md"] == 5
    (weights,) = [sibling for sibling in info.siblings if sibling.lfs]
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest() and info.used_storage > len(WEIGHTS)
    assert (info.private, info.gated, info.author) == (False, False, "org")
    top = {entry.path for entry in api.list_repo_tree("org/model")}
    assert top == {".gitattributes", "README.md", "config.json", "folder", "model.safetensors"}
    below = {entry.path for entry in api.list_repo_tree("org/model", "folder", recursive=True)}
    assert below == {"folder/deep", "folder/deep/vocab.json"}
    with pytest.raises(errors.EntryNotFoundError):
        list(api.list_repo_tree("org/model", "nowhere"))
    paths = api.get_paths_info("org/model", ["config.json", "folder/deep", "nowhere"])
    assert [path.path for path in paths] == ["config.json", "folder/deep"]
    assert [c.commit_id for c in api.list_repo_commits("org/model")][:2] == [second, first]


def test_branches_tags_and_commits(hub, tmp_path):
    api, first, second = publish(hub, tmp_path / "made")
    api.create_branch("org/model", branch="try/this", revision="v1")
    api.create_branch("org/model", branch="try/this", exist_ok=True)
    third = api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/model", revision="try/this").oid
    refs = api.list_repo_refs("org/model")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "try/this": third}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    assert api.file_exists("org/model", "x.txt", revision="try/this") and not api.file_exists("org/model", "x.txt")
    api.delete_branch("org/model", branch="try/this")
    api.delete_tag("org/model", tag="v1")
    with pytest.raises(errors.RevisionNotFoundError):
        api.repo_info("org/model", revision="v1")
    # two writers: the second one started from what is no longer the tip
    with pytest.raises(errors.HfHubHTTPError) as refused:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/model", parent_commit=first)
    assert refused.value.response.status_code == 412
    assert api.repo_info("org/model").sha == second
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/model", parent_commit=second)
    api.delete_file("x.txt", "org/model")
    api.delete_folder("folder", "org/model")
    assert not [path for path in api.list_repo_files("org/model") if path.startswith(("x", "folder"))]
    tip = api.repo_info("org/model").sha
    (tmp_path / "made/folder/deep/vocab.json").unlink()
    again = api.upload_folder(repo_id="org/model", folder_path=tmp_path / "made")
    assert again.oid == tip, "uploading the same again makes no commit"
    api.delete_repo("org/model")
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("org/model")
    api.delete_repo("org/model", missing_ok=True)


def test_collections(hub, tmp_path):
    api, *_ = publish(hub, tmp_path / "made")
    collection = api.create_collection("My models", namespace="org", description="all")
    assert api.create_collection("My models", namespace="org", exists_ok=True).slug == collection.slug
    api.add_collection_item(collection.slug, "org/model", "model", note="good")
    api.add_collection_item(collection.slug, "org/model", "model", exists_ok=True)
    api.update_collection_metadata(collection.slug, title="Ours")
    read = api.get_collection(collection.slug)
    assert (read.title, [(i.item_id, i.note) for i in read.items]) == ("Ours", [("org/model", "good")])
    assert [found.slug for found in api.list_collections(owner="org")] == [collection.slug]
    api.delete_collection_item(collection.slug, read.items[0].item_object_id)
    assert not api.get_collection(collection.slug).items
    api.delete_collection(collection.slug)
    assert not list(api.list_collections())


def test_http(hub, tmp_path):
    """ETags and ranges as the Hub has them; nobody but this machine; no way out of the directory."""
    api, first, _ = publish(hub, tmp_path / "made")
    url = f"{hub.url}/org/model/resolve/v1/model.safetensors"
    about = huggingface_hub.get_hf_file_metadata(url)
    assert about.etag == hashlib.sha256(WEIGHTS).hexdigest()
    assert (about.commit_hash, about.size) == (first, len(WEIGHTS))
    etag = huggingface_hub.get_hf_file_metadata(f"{hub.url}/org/model/resolve/main/README.md").etag
    assert etag == hashlib.sha1(b"blob 5\0about").hexdigest(), "git's object id"

    def ask(range=None, host=None):
        headers = {k: v for k, v in (("Range", range), ("Host", host)) if v}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
                return answer.status, answer.read(), answer.headers.get("Content-Range")
        except urllib.error.HTTPError as error:
            return error.code, b"", error.headers.get("Content-Range")

    size = len(WEIGHTS)
    assert ask() == (200, WEIGHTS, None)
    assert ask("bytes=10-19") == (206, WEIGHTS[10:20], f"bytes 10-19/{size}")
    assert ask(f"bytes={size - 5}-") == ask("bytes=-5") == (206, WEIGHTS[-5:], f"bytes {size - 5}-{size - 1}/{size}")
    assert ask(f"bytes={size}-") == (416, b"", f"bytes */{size}")
    assert ask(host="evil.example") == (403, b"", None), "a name that was rebound to 127.0.0.1"
    assert hub.url.startswith("http://127.0.0.1:")
    for path in ("../x", "a/../../x", "/x"):
        line = json.dumps({"key": "file", "value": {"path": path, "content": "", "encoding": "base64"}})
        commit = urllib.request.Request(f"{hub.url}/api/models/org/model/commit/main", line.encode(), method="POST")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(commit, timeout=10)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{hub.url}/api/models/..%2F..%2Fetc/passwd", timeout=10)


def test_private_and_gated(secured, tmp_path):
    ann, ben, nobody = (HfApi(endpoint=secured.url, token=token) for token in ("hf_ann", "hf_ben", False))
    assert ann.whoami()["name"] == "ann"
    for name in ("private", "gated"):
        ann.create_repo(f"ann/{name}", private=name == "private")
        ann.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=f"ann/{name}")
    ann.update_repo_settings("ann/gated", gated="manual")
    assert [info.id for info in ben.list_models()] == ["ann/gated"]
    for api, status in ((ben, 404), (nobody, 401)):
        with pytest.raises(errors.RepositoryNotFoundError) as refused:
            api.model_info("ann/private")
        assert refused.value.response.status_code == status
        assert api.model_info("ann/gated").gated == "manual", "what it is everybody may see"
        with pytest.raises(errors.GatedRepoError):
            api.hf_hub_download("ann/gated", "config.json")
        with pytest.raises(errors.HfHubHTTPError):
            api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="ann/gated")
    assert ann.hf_hub_download("ann/gated", "config.json") and ann.hf_hub_download("ann/private", "config.json")
    assert "hf_ann" not in repr(secured.requests), "tokens are not kept"


def test_contents_are_shared_and_stay(hub, tmp_path):
    """Another hub, also of another process, serves the same directory; writers wait for each other."""
    api, _, second = publish(hub, tmp_path / "made")
    code = (
        "import sys, huggingface_hub as h\n"
        "for n in range(4): h.upload_file(path_or_fileobj=b'x', path_in_repo=f'{sys.argv[1]}-{n}', repo_id='org/model')"
    )
    with LoopbackHub(tmp_path / "hub") as other:
        assert HfApi(endpoint=other.url).model_info("org/model").sha == second
        children = [
            subprocess.Popen([sys.executable, "-c", code, server.url[-3:]], env={**os.environ, **server.environment})
            for server in (hub, other)
        ]
        assert [child.wait(60) for child in children] == [0, 0]
    assert len(api.list_repo_commits("org/model")) == 3 + 8
    assert len([path for path in api.list_repo_files("org/model") if "-" in path]) == 8


def test_a_broken_connection_is_resumed(hub):
    """The client asks for the rest, from the last whole 10 MB; the hub's log shows it."""
    api = HfApi(endpoint=hub.url)
    api.create_repo("org/large")
    large = WEIGHTS * 40
    api.upload_file(path_or_fileobj=large, path_in_repo="model.safetensors", repo_id="org/large")
    hub.fail("GET .*safetensors", cut_after=len(large) - 1)
    assert Path(api.hf_hub_download("org/large", "model.safetensors")).read_bytes() == large
    downloads = [(r.range, r.status) for r in hub.requests if r.method == "GET" and "resolve" in r.path]
    assert downloads == [("", 200), (f"bytes={10 * 1024**2}-", 206)]


def test_a_hanging_hub_is_closed_at_once(tmp_path):
    hub = LoopbackHub(tmp_path / "hub")
    hub.fail("whoami", hang=600)
    failed = threading.Event()

    def ask():
        try:
            urllib.request.urlopen(f"{hub.url}/api/whoami-v2", timeout=30)
        except OSError:
            failed.set()

    threading.Thread(target=ask, daemon=True).start()
    while not hub.count("whoami"):
        pass
    hub.close()
    assert failed.wait(10)


def test_libraries(tmp_path):
    """push_to_hub and back of a model, a tokenizer and a data set, as a user's script does it."""
    for name in ("torch", "transformers", "datasets"):
        pytest.importorskip(name, reason=f"the environment has no {name}")
    with LoopbackHub(tmp_path / "hub") as hub:
        commit = hub.seed(TINY, tiny_models.llama_chat)
        script = tmp_path / "script.py"
        script.write_text(
            "import datasets, torch, transformers as t\n"
            f"model = t.AutoModelForCausalLM.from_pretrained('{TINY}', revision='{commit}')\n"
            f"tokenizer = t.AutoTokenizer.from_pretrained('{TINY}')\n"
            "model.push_to_hub('me/pushed'); tokenizer.push_to_hub('me/pushed')\n"
            "again = t.AutoModelForCausalLM.from_pretrained('me/pushed')\n"
            "assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))\n"
            "messages = [{'role': 'user', 'content': 'What is the sea?'}, {'role': 'assistant', 'content': 'Wide.'}]\n"
            "encoded = t.AutoTokenizer.from_pretrained('me/pushed').apply_chat_template(\n"
            "    messages, return_dict=True, return_assistant_tokens_mask=True)\n"
            "marked = [i for i, m in zip(encoded['input_ids'], encoded['assistant_masks']) if m]\n"
            "assert tokenizer.decode(marked) == 'Wide.<|im_end|>', tokenizer.decode(marked)\n"
            "prompt = tokenizer('What is', return_tensors='pt')\n"
            "answer = again.generate(**prompt, max_new_tokens=5, do_sample=False)\n"
            "assert answer.shape[1] > prompt['input_ids'].shape[1]\n"
            "datasets.Dataset.from_list([{'a': 1}, {'a': 2}]).push_to_hub('me/data')\n"
            "assert datasets.load_dataset('me/data', split='train')['a'][:] == [1, 2]\n"
        )
        environment = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        api = HfApi(endpoint=hub.url)
        assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(api.list_repo_files("me/pushed"))
        assert [info.id for info in api.list_datasets()] == ["me/data"]


# common.hub


def test_the_tiny_model_is_the_same_everywhere(tmp_path):
    """Two processes, whatever they did with random numbers and threads before, build the same commit."""
    torch = pytest.importorskip("torch", reason="the environment has no torch")
    pytest.importorskip("transformers", reason="the environment has no transformers")
    before = torch.random.get_rng_state()
    here = resolve(TINY)
    assert torch.equal(before, torch.random.get_rng_state()), "building it uses up no random numbers"
    code = f"import torch; torch.manual_seed(7); from common import hub; print(hub.resolve('{TINY}'))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert done.stdout.split() == [here], done.stderr[-2000:]
    size = sum(file.size for file in HfApi(endpoint=hub_module.endpoint(TINY)).list_repo_tree(TINY))
    assert size < 250_000
    assert hub_module.endpoint("org/model") is None, "the real Hub's names go where HF_ENDPOINT says"
    with pytest.raises(HubError, match=f"The loopback hub has no model local/nothing. It builds {TINY}"):
        resolve("local/nothing")


def test_a_forked_child_serves_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_models.BUILDERS, "local/files", lambda directory: fill(directory, 1))
    commit = resolve("local/files")
    url = hub_module.endpoint("local/files")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, f"{hub_module.endpoint('local/files')} {resolve('local/files')}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    other, same = os.read(read, 200).decode().split()
    assert other != url and same == commit


def test_offline_mode_and_proxies_do_not_matter_for_local_names(tmp_path):
    """Without allow_loopback the same fails in both cases."""
    code = (
        "import sys, pathlib, huggingface_hub as h; from common import hub, tiny_models\n"
        "tiny_models.BUILDERS['local/files'] = lambda p: (p / 'a.txt').write_text('a')\n"
        "if sys.argv[1:]: hub.allow_loopback = lambda: None\n"
        "commit = hub.resolve('local/files')\n"
        "h.snapshot_download('local/files', revision=commit, endpoint=hub.endpoint('local/files'))\n"
    )
    for hostile in ({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HTTP_PROXY": "http://127.0.0.1:9"}):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "no_proxy": "", "NO_PROXY": "", **hostile}
        for sabotage in ([], ["sabotage"]):
            line = [sys.executable, "-c", code, *sabotage]
            done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=900)
            assert (done.returncode != 0) == bool(sabotage), done.stderr[-2000:]


def test_resolve(hub, tmp_path):
    _, first, second = publish(hub, tmp_path / "made")
    assert (resolve("org/model"), resolve("org/model", "v1")) == (second, first)
    asked = hub.count()
    assert resolve("org/model", first) == first and hub.count() == asked, "a commit needs no request"
    api = HfApi(endpoint=hub.url)
    api.create_repo("org/data", repo_type="dataset")
    assert resolve("org/data", repo_type="dataset") == api.dataset_info("org/data").sha


def message(*arguments, **options) -> str:
    with pytest.raises(HubError) as error:
        resolve(*arguments, **options)
    return str(error.value)


def test_errors_say_what_to_do(secured, tmp_path, monkeypatch):
    ann = HfApi(endpoint=secured.url, token="hf_ann")
    ann.create_repo("ann/gated")
    ann.create_tag("ann/gated", tag="v1")
    ann.update_repo_settings("ann/gated", gated="auto")
    gated = message("ann/gated")
    assert "model ann/gated is gated, and no token is set (HTTP 401)" in gated
    assert f"Accept its terms on {secured.url}/ann/gated and set HF_TOKEN" in gated
    missing = message("ann/nothing")
    assert "There is no model ann/nothing" in missing and "no token is set; for a private one set HF_TOKEN" in missing
    assert "no data set ann/gated" in message("ann/gated", repo_type="dataset")
    unknown = message("ann/gated", "v9")
    assert "no revision 'v9'" in unknown and "There are: main, v1. Give a branch" in unknown
    assert "'no name at all' is not the name of a repository" in message("no name at all")
    assert "The revision of ann/gated is empty" in message("ann/gated", "")

    monkeypatch.setenv("HF_TOKEN", "hf_ben")
    assert "is gated, and your account has no access to it (HTTP 403). Accept" in message("ann/gated")
    assert "your token may not read it; HTTP 404" in message("ann/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = message("ann/gated")
    assert f"{secured.url} refused the token" in refused and "hf auth login" in refused
    for text in (gated, missing, unknown, refused):
        assert "hf_" not in text
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    assert len(resolve("ann/gated")) == 40

    secured.fail("", status=503)
    assert "answered HTTP 503 for the model ann/gated at main" in message("ann/gated")
    secured.fail("", status=429)
    assert "too many requests (HTTP 429)" in message("ann/gated")
    secured.fail("", hang=0)
    broken = message("ann/gated")
    assert f"The connection to {secured.url} failed" in broken and "check the network" in broken
    secured.close()
    assert "ConnectError" in message("ann/gated")
    with pytest.raises(ZeroDivisionError), clear_errors("ann/gated"):
        print(1 / 0)  # nothing to do with the Hub


def test_a_mirror_and_offline_mode(hub, tmp_path):
    """HF_ENDPOINT is honoured; offline says what is missing, and a commit is enough."""
    _, first, second = publish(hub, tmp_path / "made")
    code = "import sys; from common import hub; print(hub.resolve('org/model', sys.argv[1]))"

    def ask(revision, **environment):
        line, env = [sys.executable, "-c", code, revision], {**os.environ, **hub.environment, **environment}
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=900)
        return done.stdout.strip() or done.stderr

    assert ask("main") == second
    assert ask(first, HF_HUB_OFFLINE="1") == first
    offline = ask("main", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and revision 'main' of the model org/model is not in the datastore" in offline


def test_verify_and_private_copy(hub, tmp_path):
    api, first, second = publish(hub, tmp_path / "made")
    loaded, links = tmp_path / "loaded", tmp_path / "links"
    api.snapshot_download("org/model", revision=first, local_dir=loaded)
    links.mkdir()
    for path in loaded.iterdir():
        (links / path.name).symlink_to(path)
    assert verify(loaded, first) == verify(links, first) == 5
    copy = private_copy(links, first, tmp_path / "deep/copy")
    (copy / "config.json").write_text("mine")
    assert verify(loaded, first) == 5 and not (copy / ".cache").exists()
    temporary = [private_copy(links, first) for _ in range(2)]
    assert temporary[0] != temporary[1] and all((path / "folder/deep/vocab.json").exists() for path in temporary)
    with pytest.raises(HubError, match="copy exists"):
        private_copy(links, first, copy)

    def refuses(problem, commit=first):
        for check in (verify, lambda path, commit: private_copy(path, commit, tmp_path / "refused")):
            with pytest.raises(HubError, match=problem):
                check(links, commit)
        assert not (tmp_path / "refused").exists()

    refuses("is of commit", second)
    (loaded / "stray.txt").write_text("")
    (links / "stray.txt").symlink_to(loaded / "stray.txt")
    refuses("stray.txt is not of this download")
    (links / "stray.txt").unlink()
    vocabulary = loaded / "folder/deep/vocab.json"
    text = vocabulary.read_text()
    vocabulary.write_text(text.replace("1", "3"))
    refuses("vocab.json is damaged")
    vocabulary.write_text(text)
    (loaded / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"x")
    refuses("model.safetensors is damaged")
    (links / "model.safetensors").unlink()
    refuses("model.safetensors is missing")
    with pytest.raises(HubError, match="no record of a download"):
        verify(tmp_path / "made", first)


def test_what_the_client_takes_for_a_download(hub, tmp_path):
    """In an outage whatever lies in the target directory, even of a commit: hence nothing may lie there."""
    api, _, second = publish(hub, tmp_path / "made")
    target = tmp_path / "target"
    target.mkdir()
    (target / "leftover.txt").write_text("of another download")
    for revision, question in (("main", "revision"), (second, "tree")):
        hub.fail(question, status=403)
        assert api.snapshot_download("org/model", revision=revision, local_dir=target) == str(target)
        hub.fail(question, status=403)
        with pytest.raises(HubError, match="answered HTTP 403"), clear_errors("org/model", revision):
            api.snapshot_download("org/model", revision=revision, local_dir=tmp_path / "empty")
    with pytest.raises(HubError, match="no record of a download"):
        verify(target, second)


# with Metaflow


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A hub for flows, and the environment that sends them there."""
    root = tmp_path_factory.mktemp("flows")
    with LoopbackHub(root / "hub") as hub:
        hub_module.allow_loopback()
        _, older, commit = publish(hub, root / "made")
        publish(hub, root / "made", "org/other")
        _, _, third = publish(hub, root / "made", "org/third")
        (root / "made/leftover.json").write_text('{"version": 0}')
        publish(hub, root / "made", "org/breaks")
        hub.requests.clear()
        commits = {"HUB_COMMIT": commit, "HUB_OLDER_COMMIT": older, "HUB_THIRD_COMMIT": third}
        yield hub, {**hub.environment, **commits, "HF_HOME": str(root / "home")}


def flow(environment, *arguments, name="HubFlow", **options):
    return run_flow(TESTS, *arguments, file="hub_flow.py", flow_name=name, env=environment, **options)


@pytest.mark.xdist_group("hub_flow")
def test_one_download_serves_everyone(published):
    """Pinned commits, patterns and scopes, both ways; the second run downloads nothing, offline."""
    hub, environment = published
    data = flow(environment).data
    commit, whole = environment["HUB_COMMIT"], {"config.json": 2, "folder/deep/vocab.json": 2}
    whole["model.safetensors"] = len(WEIGHTS)
    older = {"config.json": 1, "folder/deep/vocab.json": 1}
    assert data.commit == commit, "main, resolved"
    assert data.checks["older"] == older
    assert data.checks["allow is ignore"], "why to use one of them only"
    for files, links, copied, copied_links in data.workers:
        assert files == whole and links, "@model(load=) gives symlinks into the store"
        assert copied == ["config.json", "folder", "model.safetensors"] and not copied_links
    assert data.checks["loaded"] == whole and data.checks["verified"] == 3
    assert data.checks["links"], "@huggingface_hub(load=) found what start had downloaded"
    downloads = [r.path for r in hub.requests if r.method == "GET" and f"resolve/{commit}" in r.path]
    assert sorted(path.split("/")[-1] for path in downloads if "org/model" in path) == sorted(
        ["config.json", "vocab.json", "model.safetensors"]
    ), "each file once, for two workers and two ways to load it"

    asked = hub.count()
    hostile = {"HF_HUB_OFFLINE": "1", "HTTP_PROXY": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
    again = flow({**environment, **hostile}, "--revision", commit, "--local", "1").data
    assert hub.count() == asked, "the second run asks the hub for nothing"
    assert again.workers == data.workers and again.checks["loaded"] == whole
    assert again.checks["local"] == "built"


@pytest.mark.xdist_group("hub_flow")
def test_a_download_that_breaks_caches_nothing(published):
    """In mid-file, more often than the client tries; the retry downloads it whole."""
    hub, environment = published
    commit = environment["HUB_COMMIT"]
    hub.fail(f"GET /org/model/resolve/{commit}/model.safetensors", cut_after=1000, times=6)
    hub.fail("GET /org/breaks/.*safetensors", status=500, times=None)
    run = flow({**environment, "HUB_FLOW": "broken"}, name="BrokenFlow")
    assert f"The connection to {hub.url} failed for the model org/model at {commit}" in run.output
    task = run_task(run, "start")
    assert (task["attempt"].data, task["verified"].data) == (1, 3)
    assert task["files"].data == {"config.json": 2, "folder/deep/vocab.json": 2, "model.safetensors": len(WEIGHTS)}
    assert task["entries"].data == 1
    careless = run_task(run, "careless")
    assert careless["default_scope"].data == {"config.json": 1, "folder/deep/vocab.json": 1}, "neither commit nor files"
    assert "is of commit" in careless["default_scope_refused"].data
    assert careless["token_stored"].data
    assert "500" in careless["broken"].data
    assert careless["leftovers"].data["leftover.json"] == 0, "a file that org/third never had"
    assert "leftover.json is of commit" in careless["leftovers_refused"].data


def run_task(run, step):
    from metaflow import Run, namespace

    namespace(None)
    return Run(f"{run.flow_name}/{run.run_id}")[step].task
