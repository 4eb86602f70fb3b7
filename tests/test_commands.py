"""``python -m common``: on tasks of a datastore, also running ones and plain ``save()``, on directories, and on S3."""

import json
import os
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import toy
from gallery import REPO, Example, run_flow

from common import CheckpointManager, TrainState, commands, metaflow_store
from common.__main__ import COMPLETE, main
from common.commands import parse_age, parse_best
from common.errors import CheckpointError
from common.tensors import tensors_of

pytestmark = pytest.mark.xdist_group("commands")
ROOT = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], ".metaflow")


@pytest.fixture
def cli(capsys):
    """Runs a command in this process; returns its status, output and errors."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        print(out, error)  # for the report of a failing test
        return status, out, error

    return run


@pytest.fixture
def task(monkeypatch):
    """Makes this process a task of a run that Metaflow has never heard of, as a running task looks from outside."""
    ROOT.mkdir(exist_ok=True)

    def enter(pathspec, attempt=0):
        identifier = pathspec.replace("/", "")
        monkeypatch.setenv("METAFLOW_CHECKPOINT_UID", f"{pathspec}/{identifier}/scope/{attempt}")
        from metaflow import Checkpoint

        return Checkpoint()

    yield enter


@pytest.fixture(scope="module")
def finished():
    """The pathspec of the task of a real, finished flow."""
    run = run_flow(Example(REPO / "tests"), file="toy_flow.py", flow_name="ToyFlow")
    return f"ToyFlow/{run.run_id}/train/2"


def path_of(item) -> Path:
    return ROOT / item["key"]


def flip(path: Path, place: int = -5) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_list(cli, task, finished):
    toy.run(task("Listed/1/train/7"), steps=12, keep_last=2)  # not finished, as far as Metaflow knows
    status, text, _ = cli("list", "Listed")
    assert status == 0
    assert re.search(r"^Listed/1/train/7  1 attempt$", text, re.MULTILINE)
    assert re.search(r"^ *12 +3 +loss [0-9.]+ +[0-9.]+ kB +[0-9]+ s +yes +newest", text, re.MULTILINE)
    assert json.loads(cli("list", "Listed/1/train/7", "--json")[1]) == json.loads(cli("list", "Listed", "--json")[1])
    items = json.loads(cli("list", finished.rsplit("/", 1)[0], "--json")[1])
    assert [item["step"] for item in items] == sorted(item["step"] for item in items) and items[-1]["step"] == 12
    assert items[-1] == {
        **items[-1], "task": finished, "attempt": 0, "epoch": 3, "valid": True, "fault": None, "managed": True,
    }  # fmt: skip
    assert "newest" in items[-1]["kept"] and items[-1]["metrics"].keys() == {"loss"}
    everything = {item["task"] for item in json.loads(cli("list", "--json")[1])}
    assert everything >= {finished, "Listed/1/train/7"}


def test_plain_checkpoints(cli, task, tmp_path):
    """Those of flows with nothing but @checkpoint: what can be known is shown, what cannot is not claimed."""
    place = task("Plain/1/train/7")
    (tmp_path / "weights.bin").write_text("first")
    for epoch in (1, 2, 3):
        place.save(str(tmp_path), metadata={"epoch": epoch, "loss": 1 / epoch, "note": "mine"})
    place.save(str(tmp_path), name="packed", storage_format="tar")
    items = json.loads(cli("list", "Plain/1", "--json")[1])
    assert [item["epoch"] for item in items] == [1, 2, 3, None]
    assert items[0]["metrics"] == {"loss": 1.0} and items[0]["metadata"] == {"note": "mine"}
    assert {item["valid"] for item in items} == {None} and items[0]["kept"] == ["plain save()"]
    status, text, _ = cli("verify", "Plain/1")
    assert status == 0 and text.count("no manifest, cannot be told") == 4
    status, text, warning = cli("export", items[1]["key"], tmp_path / "out")
    assert status == 0 and "nobody can tell" in warning
    assert (tmp_path / "out" / "weights.bin").read_text() == "first"
    status, _, error = cli("export", "Plain/1@packed", tmp_path / "tar")
    assert status == 2 and "could write outside" in error
    # names mean nothing here, every checkpoint has one
    text = cli("prune", "Plain", "--keep-best", "loss", "--unfinished", "--yes")[1]
    assert "deleted 2" in text
    assert [item["epoch"] for item in json.loads(cli("list", "Plain/1", "--json")[1])] == [3, None]


def test_show(cli, task):
    with CheckpointManager(task("Shown/1/train/7"), save_every=1, keep_best=("loss", "min")) as checkpoints:
        state = toy.train(checkpoints, steps=4)
        checkpoints.save(state, name="mine")
    status, text, _ = cli("show", "Shown/1")
    assert status == 0
    for line in (
        "checkpoint +step 4, epoch 1",
        "task +Shown/1/train/7, attempt 0",
        "config +learning_rate 0.1  data toy",
    ):
        assert re.search(line, text), line
    by_name = json.loads(cli("show", "Shown@mine", "--json")[1])
    assert by_name["name"] == "mine" and "named" in by_name["kept"]
    assert by_name["files"].keys() == {"state.json", "state.safetensors"} and by_name["config"] == toy.CONFIG
    assert json.loads(cli("show", by_name["key"], "--json")[1]) == by_name
    assert json.loads(cli("show", "Shown@4", "--json")[1])["step"] == 4
    assert json.loads(cli("show", "Shown/1/train/7@latest", "--json")[1])["name"] == "mine"
    toy.run(task("Shown/2/train/7"), steps=4)
    status, _, error = cli("show", "Shown")
    assert status == 2 and "of 2 tasks: write which, such as Shown/2/train/7@4" in error


def test_verify_names_the_bad_file(cli, task):
    toy.run(task("Damaged/1/train/7"), steps=12, keep_last=4)
    items = json.loads(cli("list", "Damaged", "--json")[1])
    assert cli("verify", "Damaged")[0] == 0
    flip(path_of(items[-1]) / "state.safetensors")
    (path_of(items[-2]) / "state.json").unlink()
    (path_of(items[-3]) / "more.txt").write_text("")
    status, text, _ = cli("verify", "Damaged")
    assert status == 1
    assert f"step {items[-1]['step']}  BAD: state.safetensors: its hash differs" in text
    assert f"step {items[-2]['step']}  BAD: state.json is missing" in text
    assert f"step {items[-3]['step']}  BAD: more.txt does not belong to it" in text
    results = json.loads(cli("verify", "Damaged", "--json")[1])
    assert [result["valid"] for result in results[-3:]] == [False] * 3 and results[-4]["valid"]
    # what names and sizes tell is in the list already
    assert "state.json is missing" in cli("list", "Damaged")[1]
    assert cli("export", "Damaged", ROOT.parent / "never")[0] == 1 and not (ROOT.parent / "never").exists()
    next((ROOT / "mf.checkpoints/checkpoints/metadata/Damaged").rglob("*.metadata")).write_text("{")
    status, _, error = cli("verify", "Damaged/1/train")
    assert status == 1 and "BAD: the record" in error


def test_diff(cli, tmp_path):
    for name, value in (("a", 1.0), ("b", 1.5)):
        with CheckpointManager(tmp_path / name) as checkpoints:
            state = TrainState(model=toy.Weights(), optimizer=toy.Weights())
            checkpoints.restore(state, {**toy.CONFIG, "learning_rate": value})
            state.objects["model"].value[0, 0] = value
            checkpoints.save(state, {"loss": value})
    result = json.loads(cli("diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    changed = {item["name"]: item for item in result["tensors"]}
    assert changed["model/value"] == {
        "name": "model/value", "dtype": "F32", "shape": [8, 4], "changed": 1 / 32, "largest": 0.5, "relative": 0.5,
    }  # fmt: skip
    assert "optimizer/value" not in changed and result["equal"] >= 1
    assert result["config"] == ["learning_rate: 1.0 -> 1.5"] and result["metrics"] == ["loss: 1.0 -> 1.5"]
    status, text, _ = cli("diff", tmp_path / "a", tmp_path / "b")
    assert status == 0 and re.search(r"model/value +F32 8x4 +3.1% +0.5 +0.5", text)
    for damage in (lambda path: os.truncate(path, 100), Path.unlink):
        (damaged,) = (tmp_path / "b").glob("step-*/state.safetensors")
        damage(damaged)
        status, text, error = cli("diff", tmp_path / "a", tmp_path / "b")
        assert (status, text) == (1, "") and "state.safetensors" in error, "nothing differs where there is nothing"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "int64", "bool", "complex64"])
def test_tensors_of_any_type_are_compared(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    values = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    for name, tensor in (("a", values), ("b", values.clone()), ("c", torch.zeros_like(values))):
        save_file({"x": tensor}, tmp_path / name)
    a, b, c = (tensors_of(tmp_path / name)["x"] for name in "abc")
    assert a.compare(b) is None
    found = a.compare(c)
    if dtype.startswith("float8"):
        assert found["changed"] is None
    else:
        assert (
            found["changed"] == 5 / 6 and found["largest"] == (1 if dtype == "bool" else 5) and found["relative"] == 1
        )


def test_export(cli, task, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    with CheckpointManager(tmp_path / "directory") as checkpoints:
        state = toy.train(checkpoints, steps=4)
    status, text, _ = cli("export", tmp_path / "directory", tmp_path / "weights", "--format", "safetensors")
    assert status == 0 and "model.safetensors written" in text
    weights = safetensors.load_file(tmp_path / "weights/model.safetensors")
    assert weights.keys() == {"value"} and np.array_equal(weights["value"], state.objects["model"].value)
    # all files: a checkpoint that the commands take, too
    assert cli("export", tmp_path / "directory@4", tmp_path / "files")[0] == 0
    assert cli("verify", tmp_path / "files")[0] == 0
    for arguments, message in [
        ([tmp_path / "directory", tmp_path / "files"], "is not empty"),
        ([tmp_path / "directory", tmp_path / "x", "--format", "hf"], "no files of save_pretrained"),
        ([tmp_path / "directory", tmp_path / "x", "--format", "safetensors", "--part", "y"], "take one of model, opt"),
    ]:
        status, _, error = cli("export", *arguments)
        assert status == 2 and message in error, error
    assert not (tmp_path / "x").exists()


def test_export_of_a_frameworks_files(cli, task, tmp_path):
    saved = tmp_path / "saved"
    names = ["config.json", "model.safetensors", "tokenizer.json", "optimizer.pt", "trainer_state.json"]
    saved.mkdir()
    for name in names:
        (saved / name).write_text(name)
    with CheckpointManager(task("Framework/1/train/7")) as checkpoints:
        checkpoints.restore_files()
        checkpoints.save_files(saved, step=3)
    assert cli("export", "Framework", tmp_path / "hf", "--format", "hf")[0] == 0
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names[:3]
    status, _, error = cli("export", "Framework", tmp_path / "x", "--format", "safetensors")
    assert status == 2 and "--format hf" in error


@pytest.fixture(params=["directory", "datastore"])
def living(request, task, tmp_path):
    """What names the checkpoints of a training that goes on, and a function that makes it do so, once."""
    where = f"Living{uuid.uuid4().hex}/1/train/7" if request.param == "datastore" else str(tmp_path / "living")
    place = task(where) if request.param == "datastore" else where
    with CheckpointManager(place, save_every=1, keep_last=1) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state)

        def train_on():
            checkpoints.step(state)
            return checkpoints.latest  # waits for the save

        train_on()
        yield where, train_on


@pytest.mark.parametrize(
    ("living", "function", "early"),
    [
        ("directory", (commands, "_files"), True),
        ("directory", (commands, "_files"), False),
        ("datastore", (metaflow_store, "_pairs"), False),
    ],
    indirect=["living"],
)
def test_a_list_is_made_while_a_training_deletes(cli, living, monkeypatch, function, early):
    """What is deleted while its files, manifest or record are read is neither listed nor called damaged."""
    target, train_on = living
    original, calls = getattr(*function), []

    def meanwhile(*arguments):
        calls.append(arguments)
        if early and len(calls) == 1:
            train_on()
        result = list(original(*arguments))
        if not early and len(calls) == 1:
            train_on()
        return result

    monkeypatch.setattr(*function, meanwhile)
    status, text, error = cli("list", target)
    assert status == 2 and "there are no checkpoints" in error, error
    assert calls and [item["step"] for item in json.loads(cli("list", target, "--json")[1])] == [2]


def test_what_is_deleted_while_it_is_read_is_not_called_damaged(cli, living, tmp_path, monkeypatch):
    target, train_on = living
    find = commands.find

    def and_then_it_trains_on(target):
        found = find(target)
        train_on()
        return found

    monkeypatch.setattr(commands, "find", and_then_it_trains_on)
    status, text, error = cli("verify", target)
    assert (status, text) == (0, "") and "step 1  was deleted by its training meanwhile" in error
    for arguments in (["diff", target, target], ["export", target, tmp_path / "new"]):
        status, _, error = cli(*arguments)
        assert status == 2 and "was deleted while it was read" in error and "Try again" in error, error
    assert not (tmp_path / "new").exists(), "half of an export"
    monkeypatch.undo()
    assert cli("verify", target)[0] == 0


def test_prune_spares_what_is_needed(cli, task, finished):
    """The newest valid one, the best, the named, and everything of a task that has not finished."""
    toy.run(task("Running/1/train/7"), keep_last=5)
    status, text, _ = cli("prune", "Running", "--keep-last", 1, "--yes")
    assert status == 0 and "its task has not finished" in text and "nothing to delete" in text
    text = cli("prune", finished, "--older-than", "1h", "--yes")[1]
    assert "not old enough" in text and "nothing to delete" in text
    items = json.loads(cli("list", finished, "--json")[1])
    flip(path_of(items[-1]) / "state.safetensors")
    try:
        text = cli("prune", finished, "--keep-last", 1, "--yes")[1]
    finally:
        flip(path_of(items[-1]) / "state.safetensors")
    steps = [item["step"] for item in json.loads(cli("list", finished, "--json")[1])]
    assert steps[-1] == items[-1]["step"] and items[-2]["step"] in steps, "the newest valid one was deleted"
    assert "the newest valid one" in text


def test_without_its_protections_prune_takes_them(task, monkeypatch):
    """Negative control: what the test above protects goes when nobody checks and nobody asks who is running."""
    toy.run(task("Careless/1/train/7"), keep_last=5)
    place, found = commands.find("Careless")
    assert not any(item.delete for item in commands.plan(place, found, keep_last=1))
    flip(path_of(found[-1].plain()) / "state.safetensors")

    def spared():
        return [item for item in commands.plan(place, found, keep_last=1, unfinished=True) if not item.delete]

    (best,) = (item for item in found if "best loss" in item.kept)
    assert best not in found[-2:] and [item.checkpoint for item in spared()] == [best, *found[-2:]]
    assert [item.why for item in spared()] == ["the best loss", "the newest valid one", "by the rules"]
    monkeypatch.setattr(commands, "check", lambda *_: [])
    assert [item.checkpoint for item in spared()] == [best, found[-1]]
    monkeypatch.setattr(commands, "rule_of", lambda *_: None)
    assert [item.checkpoint for item in spared()] == found[-1:]


def test_prune_in_a_directory(cli, tmp_path, monkeypatch):
    with CheckpointManager(tmp_path, save_every=1, keep_last=50) as checkpoints:
        toy.train(checkpoints)
    monkeypatch.setattr("click.confirm", lambda *_, **__: False)
    status, text, _ = cli("prune", tmp_path, "--keep-last", 2, "--keep-best", "loss:max")
    assert status == 0 and "nothing was deleted" in text
    before = json.loads(cli("list", tmp_path, "--json")[1])
    best = max((item for item in before if "loss" in item["metrics"]), key=lambda item: item["metrics"]["loss"])["step"]
    assert "deleted" in cli("prune", tmp_path, "--keep-last", 2, "--keep-best", "loss:max", "--yes")[1]
    after = {item["step"] for item in json.loads(cli("list", tmp_path, "--json")[1])}
    assert after == {best, 11, 12}
    with CheckpointManager(tmp_path) as checkpoints:  # which holds the lock as long as this process lives
        assert toy.train(checkpoints).step == 12, "what is left cannot be resumed"
    done = command("prune", tmp_path, "--keep-last", 1, "--yes")
    assert done.returncode == 2 and "another process is writing" in done.stderr
    assert command("list", tmp_path).returncode == 0, "looking must be possible while a training writes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "Nobody/12"], "there are no checkpoints of Nobody/12"),
        (["list", "a/b/c/d/e"], "write Flow/run/step/task"),
        (["list", "../x"], "there is no directory"),
        (["list", "./missing"], "there is no directory ./missing"),
        (["show", "mf.checkpoints/checkpoints/artifacts/A/b/c/d/e"], "there is no checkpoint with the key"),
        (["prune", "Nobody"], "say what to keep"),
        (["prune", "Nobody", "--older-than", "soon"], "such as 12h or 7d"),
        (["prune", "Nobody", "--keep-best", "size"], "such as size:min"),
        (["nonsense"], "No such command"),
        (["show"], "Missing argument"),
    ],
)
def test_bad_usage(cli, arguments, message):
    ROOT.mkdir(exist_ok=True)
    status, out, error = cli(*arguments)
    assert status == 2 and message in error and not out
    assert error.startswith("error: ") and error.count("\n") == 1, "one sentence, no traceback"


def test_small_parsers():
    assert parse_age("90m").total_seconds() == 5400 and parse_age("2w").days == 14
    assert (parse_best("val_loss").mode, parse_best("val_accuracy").mode, parse_best("f1:max").mode) == (
        "min", "max", "max",
    )  # fmt: skip
    with pytest.raises(CheckpointError):
        parse_best("val_loss:least")


def command(*arguments, env=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "common", *map(str, arguments)], env={**os.environ, **(env or {})}, timeout=900,
        capture_output=True, text=True, **options,
    )  # fmt: skip


def test_without_a_datastore_nothing_is_created(tmp_path):
    done = command("list", env={"METAFLOW_DATASTORE_SYSROOT_LOCAL": str(tmp_path)})
    assert done.returncode == 2 and "there is no Metaflow datastore" in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


def test_help_without_click_and_completion(tmp_path):
    code = "import sys, runpy; sys.modules['rich'] = None; runpy.run_module('common', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "error: the command line needs rich" in done.stderr and "pip" in done.stderr
    text = command("--help").stdout
    first, second = (line for line in text.splitlines() if ".local/bin" in line or COMPLETE in line)
    # the two lines of the help, in bash, and then a word to complete
    binaries = tmp_path / ".local/bin"
    binaries.mkdir(parents=True)
    script = [first, second, "COMP_WORDS=(checkpoints ver) COMP_CWORD=1", "_checkpoints_completion checkpoints ver x"]
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    text = "\n".join([*script, 'echo "${COMPREPLY[@]}"'])
    done = subprocess.run(["bash", "-c", text], cwd=REPO, env=env, capture_output=True, text=True, timeout=900)
    assert done.stdout.strip() == "verify", done.stderr


def test_on_s3(tmp_path):
    """The same on an object store (a server on loopback)."""
    pytest.importorskip("moto.server", reason="moto is not installed")
    import socket

    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    env = {
        "METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    code = f"import sys; sys.path.insert(0, {str(REPO / 'tests')!r}); import metaflow, toy\n"
    code += "toy.run(metaflow.Checkpoint(), steps=4, save_every=2, keep_last=3)"
    try:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
                              aws_access_key_id="x", aws_secret_access_key="x")  # fmt: skip
        for _ in range(900):
            try:
                client.create_bucket(Bucket="bucket")
                break
            except Exception:
                time.sleep(0.2)
        uid = {"METAFLOW_CHECKPOINT_UID": "Cloud/1/train/7/identifier/scope/0"}
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **env, **uid}, check=True, timeout=900)
        # each command takes seconds there: these two read records, events, manifests and files between them
        pruned = command("prune", "Cloud/1/train/7", "--keep-last", 1, "--unfinished", "--yes", env=env)
        assert re.search(r"delete +2 .*\n *keep +4 .* the newest valid one", pruned.stdout), (
            pruned.stdout + pruned.stderr
        )
        (key,) = (
            item["Key"]
            for item in client.list_objects_v2(Bucket="bucket")["Contents"]
            if item["Key"].endswith("/state.json")
        )
        client.put_object(Bucket="bucket", Key=key, Body=b"{}")
        verified = command("verify", "Cloud/1/train/7", "--json", env=env)
        (item,) = json.loads(verified.stdout)
        assert verified.returncode == 1 and item["step"] == 4 and "state.json: 2 bytes instead of" in item["faults"][0]
    finally:
        server.kill()
        server.wait()
