"""Publishing: what travels and what does not, one commit or none, and a hub that fails while a training runs."""

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import toy
from gallery import REPO, Example, run_flow

from common import CheckpointError, CheckpointManager, Publisher, publish
from common import hub as hub_module
from common import publisher as publisher_module
from common.__main__ import main
from common.hub import HubError
from common.loopback_hub import LoopbackHub
from common.model_card import About
from common.publish import push

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the environment has no Hub client")
safetensors = pytest.importorskip("safetensors.numpy", reason="the environment has no safetensors")
from huggingface_hub import HfApi, ModelCard, constants  # noqa: E402

pytestmark = pytest.mark.xdist_group("publish")
ROOT = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], ".metaflow")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def client(monkeypatch, tmp_path):
    """The client of this process may talk to 127.0.0.1, has no token and a cache of its own."""
    for name, value in (("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_TOKEN_PATH", str(tmp_path / "token"))):
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    hub_module.allow_loopback()


def serve(monkeypatch, hub):
    """Send this process, whose client has read its environment, and its children to a hub."""
    monkeypatch.setattr(hub_module, "endpoint", lambda repo_id: hub.url)
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    return hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub(tmp_path / "hub") as hub:
        yield serve(monkeypatch, hub)


@pytest.fixture
def secured(tmp_path, monkeypatch):
    with LoopbackHub(tmp_path / "secured", tokens={"hf_ann": "ann", "hf_ben": "ben"}) as hub:
        yield serve(monkeypatch, hub)


@pytest.fixture
def task(monkeypatch):
    """Makes this process a task of a run, as in test_commands.py."""
    ROOT.mkdir(exist_ok=True)

    def enter(pathspec, attempt=0):
        monkeypatch.setenv("METAFLOW_CHECKPOINT_UID", f"{pathspec}/{pathspec.replace('/', '')}/scope/{attempt}")
        from metaflow import Checkpoint

        return Checkpoint()

    yield enter


def command(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def commits(hub, repo="user/toy") -> list[str]:
    """The titles, newest first."""
    return [commit.title for commit in HfApi(endpoint=hub.url).list_repo_commits(repo)]


def files(hub, repo="user/toy", revision="main") -> dict[str, bytes]:
    root = Path(HfApi(endpoint=hub.url).snapshot_download(repo, revision=revision))
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def wait_for(condition, seconds=300):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.02)


def save_pretrained(directory: Path, **adapter) -> Path:
    """A directory like a Trainer's checkpoint of an adapter, with everything that must stay at home."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", **adapter}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.save_file({"a": np.ones(3, np.float32)}, directory / "adapter_model.safetensors")
    tokenizer = {"model_max_length": 8, "tokenizer_file": str(directory / "tokenizer.json"), "extra": "/think"}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer.json").write_text(json.dumps({"vocab": {str(directory): 1, "/usr/bin": 2}}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "pytorch_model.bin", "trainer_state.json",
                 "notes.txt", ".lock", "weights.pkl", "README.md"):  # fmt: skip
        (directory / name).write_text(f"from {directory}")
    return directory


# ------------------------------------------------------------ one push


def test_a_checkpoint_of_a_run(hub, task, capsys):
    """One commit, none for the same again, and then only the files that differ."""
    place = task("Toy/1/train/7")
    toy.run(place, steps=4, config={**toy.CONFIG, "api_key": "sesame", "data_dir": "/data/mine"})
    capsys.readouterr()
    assert command("push", "Toy/1", "user/toy", "--license", "mit", "--language", "en", "--tag", "toy") == 0
    assert "step 4 of Toy/1/train/7 is in " in capsys.readouterr().out
    first = files(hub)
    assert set(first) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    state = toy.new_state()
    with CheckpointManager(place) as checkpoints:
        checkpoints.restore(state, {**toy.CONFIG, "api_key": "sesame", "data_dir": "/data/mine"})
        assert (safetensors.load(first["model.safetensors"])["value"] == state.objects["model"].value).all()
        assert json.loads(first["config.json"]) == toy.CONFIG, "neither the secret nor the path"
        assert HfApi(endpoint=hub.url).repo_info("user/toy").private
        asked = hub.count("POST|PUT")
        assert command("push", "Toy/1", "user/toy", "--license", "mit", "--language", "en", "--tag", "toy") == 0
        assert "it was there already" in capsys.readouterr().out
        assert hub.count("POST|PUT") == asked, "only questions"
        checkpoints.step(state)
        checkpoints.save(state)
    assert command("push", "Toy/1", "user/toy", "--license", "mit", "--language", "en", "--tag", "toy", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["files"] == ["README.md"], "no step was trained, the weights are the same"
    assert commits(hub) == ["Push step 5 of Toy/1/train/7", "Push step 4 of Toy/1/train/7", "initial commit"]
    assert command("push", "Toy/1@4", "user/toy", "--json") == 0
    text = b"".join(files(hub).values()).decode(errors="replace")
    assert "sesame" not in text and "/data/mine" not in text


def test_the_card(hub, tmp_path):
    about = About("org/base@" + COMMIT, "org/data", "apache-2.0", ["en"], ["tiny"], "Flow/1/train/2", 12, 3,
                  {"eval_loss": 0.5}, {"learning_rate": 0.1, "hub_token": "sesame", "root": "/data/mine"},
                  {"torch": "2.15"}, [8])  # fmt: skip
    done = push(save_pretrained(tmp_path / "made"), "user/lora", about)
    text = files(hub, "user/lora", done.commit)["README.md"].decode()
    data = ModelCard(text).data
    assert (data.base_model, data.datasets, data.license) == ("org/base", ["org/data"], "apache-2.0")
    assert (data.language, data.library_name, data.pipeline_tag) == (["en"], "peft", "text-generation")
    assert data.tags == ["metaflow", "lora", "tiny"]
    for words in (
        f"an adapter of [org/base](https://huggingface.co/org/base/tree/{COMMIT})", "| eval_loss | 0.5 |", "at step 12",
        "| learning_rate | 0.1 |", "| Metaflow task | `Flow/1/train/2` |", f"org/base, commit `{COMMIT}`", "| 8 |",
        'model = AutoPeftModelForCausalLM.from_pretrained("user/lora")', "| torch | 2.15 |",
        'tokenizer = AutoTokenizer.from_pretrained("user/lora")',
    ):  # fmt: skip
        assert words in text, words
    assert "sesame" not in text and "/data/mine" not in text and str(tmp_path) not in text
    adapter = json.loads(files(hub, "user/lora")["adapter_config.json"])
    assert adapter["revision"] == COMMIT, "peft loads the base model at this commit"


def test_only_what_is_on_the_list_travels(hub, tmp_path):
    """And paths of this machine are taken out where that is right, and refused where it is not."""
    made = save_pretrained(tmp_path / "made", base_model_name_or_path=str(tmp_path / "snapshot"))
    push(made, "user/lora", About("org/base"), private=True)
    published = files(hub, "user/lora")
    assert set(published) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert json.loads(published["tokenizer_config.json"]) == {"model_max_length": 8, "extra": "/think"}
    assert published["tokenizer.json"] == (made / "tokenizer.json").read_bytes(), "a vocabulary is left as it is"
    published.pop("tokenizer.json")
    assert str(tmp_path) not in repr(published)

    def refused(problem, about=None, **changes):
        before = hub.count("POST|PUT")
        broken = save_pretrained(tmp_path / "broken", **changes)
        with pytest.raises(CheckpointError, match=problem):
            push(broken, "user/refused", about)
        assert hub.count("POST|PUT") == before, "before anything is sent"

    refused("--base-model org/name@COMMIT", base_model_name_or_path="/data/base")
    refused("which is not published", auto_mapping={"code": "/data/code.py"})
    refused("a path of this machine", target_modules=["/data/layers"])
    refused("looks like an access token", note="hf_" + "a1" * 17)
    for path in (tmp_path / "broken").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="nothing to publish for user/refused: .* pickles are not"):
        push(tmp_path / "broken", "user/refused")


def test_without_the_cleaning_a_path_would_travel(hub, tmp_path, monkeypatch):
    """Negative control of the test above."""
    monkeypatch.setattr(publish, "is_path", lambda value: False)
    push(save_pretrained(tmp_path / "made", base_model_name_or_path=str(tmp_path / "snapshot")), "user/lora")
    published = files(hub, "user/lora")
    assert str(tmp_path) in published["adapter_config.json"].decode()
    assert str(tmp_path) in published["tokenizer_config.json"].decode()


def test_a_push_gives_up_on_a_hub_that_hangs(hub, tmp_path):
    """The client by itself waits for ever."""
    hub.fail("", hang=600, times=None)
    publish.set_up_client("user/lora", timeout=0.3)
    with pytest.raises(HubError, match="The connection to .* failed for the model user/lora .*Timeout"):
        push(save_pretrained(tmp_path / "made"), "user/lora")


def test_another_model_in_the_same_repository(hub, tmp_path):
    """Old weights go, or from_pretrained would load them; what somebody else put there stays."""
    api = HfApi(endpoint=hub.url)
    push(save_pretrained(tmp_path / "adapter"), "user/toy")
    api.upload_file(path_or_fileobj=b"x", path_in_repo="images/a.png", repo_id="user/toy")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "_name_or_path": "/data/base"}')
    safetensors.save_file({"b": np.ones(2, np.float32)}, whole / "model.safetensors")
    push(whole, "user/toy")
    there = files(hub)
    assert {"config.json", "model.safetensors", "images/a.png", "tokenizer.json"} < set(there)
    assert "adapter_config.json" not in there and "adapter_model.safetensors" not in there
    assert json.loads(there["config.json"]) == {"architectures": ["LlamaForCausalLM"]}


def test_errors_say_what_to_do(secured, tmp_path, monkeypatch, capsys):
    made = save_pretrained(tmp_path / "made")

    def message(repo="ann/lora", **options) -> str:
        with pytest.raises(HubError) as error:
            push(made, repo, **options)
        assert "hf_" not in str(error.value)
        return str(error.value)

    assert "needs a token with write permission, and no token is set (HTTP 401). Set HF_TOKEN" in message()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refused the token" in message()
    monkeypatch.setenv("HF_TOKEN", "hf_ben")
    assert "Your token may not write to ann (HTTP 403)" in message()
    for name in ("lora", "a/b/c", "../x", "a/..", "user/x.git"):
        assert "Names look like user/name" in message(name)
    monkeypatch.setattr(hub_module, "endpoint", lambda repo_id: secured.url)
    assert "built on the spot" in message("local/tiny-llama-chat")
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    assert push(made, "ann/lora").files
    secured.fail("POST .*/commit/", status=403)  # a token that may only read
    (made / "chat_template.jinja").write_text("new")
    assert "Your token may not write" in message()

    class Hasty(HfApi):
        """Somebody else pushes between the look and the commit."""

        def create_commit(self, *arguments, **options):
            theirs = HfApi(endpoint=self.endpoint)
            theirs.upload_file(path_or_fileobj=b"x", path_in_repo="theirs.txt", repo_id="ann/lora")
            return super().create_commit(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "api", lambda repo: Hasty(endpoint=secured.url))
        assert "Somebody else pushed to ann/lora in the meantime" in message()
    assert "chat_template.jinja" in push(made, "ann/lora").files, "after that it goes"
    HfApi(endpoint=secured.url).update_repo_settings("ann/lora", private=False)
    assert "is public, and a push is private unless you say otherwise. Say --public" in message()
    assert not push(made, "ann/lora", private=False).private
    status = command("push", "Nobody/1", "ann/lora")
    assert status == 2 and "there are no checkpoints of Nobody/1" in capsys.readouterr().err
    assert command("push", "Nobody/1", "wrong") == 2 and "Names look like" in capsys.readouterr().err


def test_a_tar_cannot_leave_its_directory(task, tmp_path):
    """Neither with ``../`` nor through a link (H7)."""
    task("Tar/1/train/7")
    store = ROOT / "mf.models/models/artifacts"
    store.mkdir(parents=True, exist_ok=True)
    (tmp_path / "x").write_text("x")
    for name, member in (("dots_1", "../outside"), ("fine_1", "/config.json")):
        with tarfile.open(store / name, "w") as tar:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(link)
            tar.add(tmp_path / "x", member)
    record = {"storage_format": "tar", "key": "mf.models/models/artifacts/fine_1"}
    target = tmp_path / "target"
    target.mkdir()
    publish._Models().extract(record, target)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    with pytest.raises(CheckpointError, match="outside of its directory"):
        publish._Models().extract({**record, "key": "mf.models/models/artifacts/dots_1"}, target)
    assert not (tmp_path / "outside").exists()


# ------------------------------------------------------------ during a training


def train(place, publisher, between=lambda step: None, steps=12, directory=None, **options):
    """The toy's training under a publisher, with something between its steps; what it ends with."""
    with publisher, CheckpointManager(place, save_every=1, keep_best=("loss", "min"), **options) as checkpoints:
        step = checkpoints.step

        def slow(state, metrics=None):
            step(state, metrics)
            between(state.step)

        checkpoints.step = slow
        digest = toy.digest(toy.train(checkpoints, steps=steps))
        if directory is not None:
            checkpoints.step = step
            model = {"value": toy_weights(checkpoints)}
            directory.mkdir(exist_ok=True)
            safetensors.save_file(model, directory / "model.safetensors")
            publisher.model(directory)
    return digest


def toy_weights(checkpoints):
    return checkpoints.load_state(checkpoints.latest)["model"]["value"]


def background(repo="user/toy", place=None, **options) -> Publisher:
    return Publisher(repo, place, **{"interval": 0.05, "timeout": 5, "patience": 300, **options})


def test_while_it_trains(hub, task, tmp_path, capsys):
    """Checkpoints arrive during the training, the model at its end; a retry and the command make no further commit."""
    straight = toy.run(tmp_path / "straight")
    place = task("During/1/train/7")

    def between(step):
        if step in (3, 9):  # steps go on only when the hub has one more
            wait_for(lambda: hub.count("POST .*/commit/") > (step == 9))

    publisher = background(place=place)
    assert train(place, publisher, between, directory=tmp_path / "model") == straight
    titles = commits(hub)
    assert titles[0] == "Push the model of During/1/train/7" and titles[-1] == "initial commit"
    assert len(titles) >= 4 and all(title.startswith("Push step") for title in titles[1:-1])
    assert "[publish] the model of During/1/train/7 is on user/toy (commit" in capsys.readouterr().out
    # the retry after a kill in the last moment
    retry = task("During/1/train/7", attempt=1)
    assert train(retry, background(place=retry, strategy="end"), directory=tmp_path / "model") == straight
    assert "was on user/toy already" in capsys.readouterr().out
    assert commits(hub) == titles


@pytest.mark.parametrize("fault", [{"status": 500}, {"hang": 600.0}])
def test_a_hub_that_fails_is_not_the_trainings_business(hub, task, tmp_path, capsys, fault):
    """No step waits for it; the end waits as long as it was told; the printed command pushes what is missing."""
    straight = toy.run(tmp_path / "straight")
    name = f"Failing{fault.get('status', 'Hang')}/1/train/7"
    place = task(name)
    hub.fail("", times=None, **fault)
    publisher = background(place=place, timeout=600, patience=1)
    ended = []

    def between(step):
        if step == 2:  # the other steps are done with a request under way, or failed
            wait_for(lambda: hub.requests)
        if step == 12:
            ended.append(time.monotonic())

    assert train(place, publisher, between) == straight
    assert time.monotonic() - ended[0] < 15, "patience is 1 s"
    text = capsys.readouterr().out
    assert "[publish] The newest checkpoint is not on user/toy (" in text
    assert text.count("could not be pushed") == ("status" in fault), "said once, and only when it is known"
    assert ("answered HTTP 500" if "status" in fault else "no end after 1 s") in text.partition("is not on")[2]
    line = text.partition("Push it later: ")[2].splitlines()[0]
    hub._faults.clear()
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]], cwd=REPO, env=os.environ, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and f"step 12 of {name} is in {hub.url}/user/toy (private)" in done.stdout, done.stderr
    assert len(commits(hub)) == 2


def test_it_catches_up(hub, task, capsys):
    """After an outage the newest checkpoint is pushed, and none of those that it has replaced."""
    place = task("Outage/1/train/7")
    hub.fail("", status=500, times=None)
    publisher = background(place=place)

    def between(step):
        if step == 2:
            wait_for(lambda: publisher._failure)
        if step == 6:
            hub._faults.clear()
            wait_for(lambda: hub.count("POST .*/commit/"))
            wait_for(lambda: not publisher._failure)

    train(place, publisher, between)
    text = capsys.readouterr().out
    assert text.count("could not be pushed") == 1 and text.count("is on user/toy again (commit") == 1
    titles = commits(hub)
    assert "Push step 1 of Outage/1/train/7" not in titles and titles[0] == "Push step 12 of Outage/1/train/7"


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_failure(hub, tmp_path, monkeypatch):
    """The training deletes what it does not keep, whoever reads it; the newest one is pushed instead, at once."""
    toy.run(tmp_path / "c", keep_last=3, keep_best=None)
    orders, news, tried, export = queue.SimpleQueue(), [], [], publish.export

    def delete_first(place, item, *rest):
        tried.append(Path(item.entry.where))
        if len(tried) == 1:
            shutil.rmtree(item.entry.where)
        export(place, item, *rest)

    def report(line):
        news.append(line)
        orders.put(None)

    monkeypatch.setattr(publish, "export", delete_first)
    orders.put({**Publisher("user/toy", tmp_path / "c")._order, "target": str(tmp_path / "c"), "interval": 600})
    publisher_module._background(orders, report)
    assert len(tried) == 2 and not tried[0].exists() and tried[1].exists()
    assert len(news) == 1 and "commit" in news[0], news
    # one that stays and cannot be read is a failure
    state = tried[1] / "state.json"
    state.write_bytes(state.read_bytes()[::-1])
    orders.put({**Publisher("user/toy", tmp_path / "c")._order, "target": str(tmp_path / "c"), "interval": 600})
    publisher_module._background(orders, report)
    assert len(tried) == 3 and "state.json" in news[1]["failed"]


def test_strategies(hub, task, tmp_path):
    """end: not a request before it. checkpoint: another machine trains on from what is on the Hub."""
    place = task("End/1/train/7")
    asked = []
    train(
        place, background(place=place, strategy="end"), lambda step: asked.append(hub.count()), directory=tmp_path / "m"
    )
    assert asked == [0] * 12 and commits(hub) == ["Push the model of End/1/train/7", "initial commit"]
    (tmp_path / "there").mkdir()
    train(tmp_path / "here", background("user/whole", tmp_path / "here", strategy="checkpoint"), steps=8)
    published = files(hub, "user/whole")
    assert {"last-checkpoint/state.safetensors", "last-checkpoint/state.json", "model.safetensors"} < set(published)
    text = b"".join(published.values()).decode(errors="replace")
    assert str(tmp_path) not in text and "Metaflow" not in text
    root = HfApi(endpoint=hub.url).snapshot_download("user/whole")
    with CheckpointManager(tmp_path / "there", resume_from=root) as checkpoints:
        resumed = toy.train(checkpoints, steps=12)
    assert checkpoints.resumed_from == [8]
    assert toy.digest(resumed)[0] == toy.run(tmp_path / "straight")[0]


def test_without_a_repository_and_with_a_wrong_one(task):
    place = task("Nothing/1/train/7")
    with Publisher("", place) as publisher:
        assert publisher._process is None
    options = {"license": "mit", "language": ["en", "de"], "tags": ["a b"], "base_model": "org/base"}
    with Publisher("user/toy", place, strategy="end", private=False, **options) as publisher:
        assert shlex.split(publisher.command)[4:] == [
            "Nothing/1/train/7", "user/toy", "--base-model", "org/base", "--license", "mit", "--language", "en",
            "--language", "de", "--tag", "a b", "--public",
        ]  # fmt: skip
        publisher._repo = ""  # nothing is to be pushed
    with pytest.raises(HubError, match="Names look like user/name"):
        Publisher("user", place)
    with pytest.raises(CheckpointError, match="strategy is 'always': choose one of end, every_save, checkpoint"):
        Publisher("user/toy", place, strategy="always")
    with pytest.raises(CheckpointError, match="give current.checkpoint"), Publisher("user/toy"):
        pass


def test_its_process_ends_with_the_training(hub, task, tmp_path):
    """After an error, which passes, and after SIGKILL, also when the hub hangs."""
    hub.fail("", hang=600, times=None)
    place = task("Dying/1/train/7")
    publisher = background(place=place, timeout=600)
    with pytest.raises(ZeroDivisionError):
        train(place, publisher, lambda step: wait_for(lambda: hub.requests) or 1 / 0)
    assert publisher._process.returncode == -signal.SIGKILL
    code = (
        f"import sys; sys.path.insert(0, {str(REPO / 'tests')!r}); import time, toy\n"
        "from common import CheckpointManager, Publisher\n"
        f"with Publisher('user/toy', {str(tmp_path / 'x')!r}) as p, CheckpointManager({str(tmp_path / 'x')!r}) as c:\n"
        "    toy.train(c, steps=4); print(p._process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = next(int(line) for line in parent.stdout if line.strip().isdigit())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


# ------------------------------------------------------------ an adapter


LORA = '''
from pathlib import Path
from metaflow import FlowSpec, checkpoint, current, huggingface_hub, model, retry, step
import common

BASE = "local/tiny-llama-chat"


class TinyLoraFlow(FlowSpec):
    """A few steps of LoRA on the tiny Llama, on the base model's own files in a temporary directory."""

    @huggingface_hub(cache_scope="flow")
    @step
    def start(self):
        self.commit = common.hub.resolve(BASE)
        self.base_model = current.huggingface_hub.snapshot_download(
            repo_id=BASE, revision=self.commit, endpoint=common.hub.endpoint(BASE)
        )
        self.next(self.train)

    @retry(times=2, minutes_between_retries=0)
    @model(load=["base_model"])
    @checkpoint(load_policy="none", show_card=False)
    @step
    def train(self):
        import torch, transformers as t
        from common.transformers import CheckpointCallback, ResumableTrainer
        from peft import LoraConfig, get_peft_model

        base = common.hub.private_copy(current.model.loaded["base_model"], self.commit)
        t.set_seed(0)
        tokenizer = t.AutoTokenizer.from_pretrained(base)
        lora = get_peft_model(t.AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
        data = [dict(tokenizer(f"{n} and {n} is {n + n}", padding="max_length", max_length=24)) for n in range(16)]
        data = [{**row, "labels": row["input_ids"]} for row in data]
        config = {"base_model": BASE, "base_commit": self.commit, "dataset": "sums", "r": 2}
        with common.CheckpointManager(current.checkpoint, save_every=2) as checkpoints:
            callback = CheckpointCallback(checkpoints)
            arguments = t.TrainingArguments(
                str(checkpoints.directory / "out"), max_steps=6, per_device_train_batch_size=4, learning_rate=0.1,
                report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
            )
            trainer = ResumableTrainer(
                lora, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
            )
            trainer.train(resume_from_checkpoint=checkpoints.restore_files(config, total_steps=6))
            trainer.save_model(str(checkpoints.directory / "adapter"))
        self.resumed_from = checkpoints.resumed_from
        self.b = [float(w.sum()) for name, w in sorted(lora.state_dict().items()) if "lora_B" in name]
        self.adapter = current.model.save(str(checkpoints.directory / "adapter"), label="tiny_lora")
        current.model.save(str(checkpoints.directory / "adapter"), label="as_files", storage_format="files")
        self.next(self.end)

    @step
    def end(self):
        pass


if __name__ == "__main__":
    TinyLoraFlow()
'''

USE = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained("user/lora")
tokenizer = AutoTokenizer.from_pretrained("user/lora")
prompt = tokenizer("3 and 3 is", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
b = [float(w.sum()) for name, w in sorted(model.state_dict().items()) if "lora_B" in name]
print(json.dumps([b, tokenizer.decode(answer[0]), list(answer.shape)]))
"""


def test_an_adapter_of_a_killed_and_resumed_run(tmp_path, monkeypatch, capsys):
    """AutoPeftModelForCausalLM.from_pretrained loads what ``python -m common push`` pushed, and it generates."""
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"the environment has no {name}")
    (tmp_path / "flow.py").write_text(LORA)
    home = {"HF_HOME": str(tmp_path / "home")}
    monkeypatch.setenv("HF_HOME", home["HF_HOME"])
    example = Example(tmp_path)
    run = run_flow(example, flow_name="TinyLoraFlow", faults="kill@step=5", env=home)
    target = f"TinyLoraFlow/{run.run_id}"
    data = run_data(target)
    assert data.resumed_from in ([2], [4]) and any(data.b), "SIGKILL may take the save of step 4"
    # the hub that has the base model under local/, and where the adapter is pushed to
    with LoopbackHub(hub_module.local_directory()) as hub:
        serve(monkeypatch, hub)
        assert command("push", target, "user/lora") == 2
        assert f"{target} names 2 models: write which one, of {target}/train/" in capsys.readouterr().err
        assert command("push", f"{target}@tiny_lora", "user/lora", "--json") == 0
        pushed = json.loads(capsys.readouterr().out)
        assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} < set(pushed["files"])
        published = files(hub, "user/lora")
        text = b"".join(published.values()).decode(errors="replace")
        assert "training_args.bin" not in published and str(tmp_path) not in text and "metaflow-hub" not in text
        commit = data_of(target, "start").commit
        adapter = json.loads(published["adapter_config.json"])
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("local/tiny-llama-chat", commit)
        card = published["README.md"].decode()
        assert (
            f"| Metaflow task | `{target}/train/" in card and commit in card and f"| {data.resumed_from[0]} |" in card
        )
        for same in (f"{target}@tiny_lora", f"{target}/train@as_files", f"{target}/train@6"):  # its last checkpoint
            assert command("push", same, "user/lora", "--json") == 0
            assert json.loads(capsys.readouterr().out)["files"] == [], same
        environment = {**os.environ, **hub.environment, **home}
        done = subprocess.run(
            [sys.executable, "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-3000:]
        b, answer, shape = json.loads(done.stdout.splitlines()[-1])
        assert b == data.b, "not the trained adapter"
        assert answer.startswith("3 and 3 is") and shape[1] >= 8


def data_of(target, step):
    from metaflow import Run, namespace

    namespace(None)
    return Run(target)[step].task.data


def run_data(target):
    return data_of(target, "train")
