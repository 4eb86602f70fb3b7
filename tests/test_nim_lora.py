"""What is special about nim_lora: NIM's layout, the servers, and the way from a killed training to an answer.

The NIM container cannot run here. A stub stands for what a client sees of it: a slow start, and a model per adapter.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from gallery import REPO, Example, run_flow
from safetensors.numpy import load_file, save_file

from common import weights_digest

EXAMPLE = Example(REPO / "nim_lora")
pytestmark = pytest.mark.xdist_group("nim_lora")


def load_module(name: str, directory: Path = EXAMPLE.path):
    """A file of the example under a name of its own, because other examples have such files, too."""
    spec = importlib.util.spec_from_file_location(f"nim_lora_{name}", directory / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


export = load_module("export")


def script(name: str, *arguments: str, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE.path / name), *arguments],
        cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -------------------------------------------------------------------- the layout


def make_adapter(path: Path, rank: int = 4, extra: str = "", **settings) -> Path:
    path.mkdir()
    values = {"peft_type": "LORA", "r": rank, "base_model_name_or_path": "org/model", **settings}
    (path / export.CONFIG).write_text(json.dumps(values))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{layer}.lora_A.weight": np.ones((rank, 8)), f"{layer}.lora_B.weight": np.ones((8, rank))}
    if extra:
        tensors[f"{layer}.{extra}"] = np.ones(8)
    save_file(tensors, path / export.WEIGHTS)
    return path


def test_an_adapter_is_exported_once_and_stays(tmp_path):
    adapter, source = make_adapter(tmp_path / "adapter"), tmp_path / "nim"
    (adapter / "training_args.bin").write_bytes(b"a pickle")
    links = tmp_path / "links"
    links.mkdir()
    for file in adapter.iterdir():
        (links / file.name).symlink_to(file)
    target = export.export_adapter(links, source, "helpdesk")
    assert sorted(path.name for path in target.iterdir()) == [export.CONFIG, export.WEIGHTS]
    assert not any(path.is_symlink() for path in target.iterdir()), "a link is dead in a container"
    before = target.stat().st_ino
    assert export.export_adapter(adapter, source, "helpdesk").stat().st_ino == before
    other = make_adapter(tmp_path / "other", rank=8)
    with pytest.raises(export.ExportError, match="is another adapter.*helpdesk-v2"):
        export.export_adapter(other, source, "helpdesk")
    assert export.export_adapter(other, source, "helpdesk-v2").name == "helpdesk-v2"
    assert sorted(path.name for path in source.iterdir()) == ["helpdesk", "helpdesk-v2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 64}, "rank of the adapter is 64.*32 at most.*--lora-r"),
        ({"base_model_name_or_path": "/models/llama"}, "'/models/llama'.*name on the Hub"),
        ({"base_model_name_or_path": "./llama"}, "name on the Hub"),
        ({"base_model_name_or_path": None}, "name on the Hub"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 8}, "says rank 8.*has \\[4\\]"),
        ({"extra": "lora_magnitude_vector.weight"}, "lora_magnitude_vector.*without DoRA"),
        ({"extra": "bias"}, "bias, which is no matrix"),
    ],
)
def test_what_nim_could_not_load_is_refused_before_anything_is_written(tmp_path, change, message):
    adapter = make_adapter(tmp_path / "adapter", **change)
    with pytest.raises(export.ExportError, match=message):
        export.export_adapter(adapter, tmp_path / "nim", "helpdesk")
    assert not (tmp_path / "nim").exists()


def test_damaged_files_and_bad_names_are_refused(tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    for name in ("", "..", "a/b", ".hidden", "a b"):
        with pytest.raises(export.ExportError, match="is no name for an adapter"):
            export.export_adapter(adapter, tmp_path / "nim", name)
    for file in (export.CONFIG, export.WEIGHTS):
        whole = (adapter / file).read_bytes()
        for damage in (whole[: len(whole) // 2], None):
            (adapter / file).unlink()
            if damage is not None:
                (adapter / file).write_bytes(damage)
            with pytest.raises(export.ExportError, match="no adapter that can be read"):
                export.export_adapter(adapter, tmp_path / "nim", "helpdesk")
            (adapter / file).write_bytes(whole)
    assert not (tmp_path / "nim").exists()
    export.export_adapter(adapter, tmp_path / "nim", "helpdesk")  # the same adapter, whole


def seen_while_copying(monkeypatch, source: Path, copy) -> list[list[str]]:
    """What NIM would see in ``source`` if it looked before each file is copied."""
    seen, original = [], shutil.copyfile

    def watched(*arguments, **options):
        seen.append(sorted(path.name for path in source.iterdir()) if source.exists() else [])
        return original(*arguments, **options)

    monkeypatch.setattr(shutil, "copyfile", watched)
    copy()
    monkeypatch.setattr(shutil, "copyfile", original)
    return seen


def test_nim_never_sees_half_an_adapter(tmp_path, monkeypatch):
    adapter, source = make_adapter(tmp_path / "adapter"), tmp_path / "nim"
    seen = seen_while_copying(monkeypatch, source, lambda: export.export_adapter(adapter, source, "helpdesk"))
    assert seen == [[], []]
    (source / "naive").mkdir()  # the control: what a plain copy shows
    naive = lambda: [shutil.copyfile(file, source / "naive" / file.name) for file in adapter.iterdir()]  # noqa: E731
    assert all("naive" in names for names in seen_while_copying(monkeypatch, source, naive))


def test_an_export_that_is_killed_leaves_nothing_behind(tmp_path, monkeypatch):
    adapter, source = make_adapter(tmp_path / "adapter"), tmp_path / "nim"
    if (pid := os.fork()) == 0:
        monkeypatch.setattr(shutil, "copyfile", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        export.export_adapter(adapter, source, "helpdesk")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert list(source.iterdir()) == []
    unfinished = tmp_path / ".nim-unfinished"
    assert list(unfinished.iterdir()), "it did not die in the middle"
    export.export_adapter(adapter, source, "helpdesk")
    assert list(unfinished.iterdir()) == []


# -------------------------------------------------------------------- the data


def test_rows_that_are_no_dialogues_are_named():
    settings = load_module("settings")
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    bad = [{}, [], {"messages": []}, {"messages": good["messages"][:1]}, {"messages": [{"role": "assistant"}]}]
    config = settings.TrainConfig()
    for row in bad:
        with pytest.raises(ValueError, match="row 10: it needs"):
            settings.load_dialogues(config, "\n".join(map(json.dumps, [*[good] * 9, row])))
    assert settings.load_dialogues(config, "\n".join(map(json.dumps, [good] * 9))) == [good["messages"]] * 9
    with pytest.raises(ValueError, match="there are 1 dialogues"):
        settings.load_dialogues(config, json.dumps(good))
    assert len(settings.load_dialogues(config)) >= 150


def test_json_lines_end_at_line_feeds_only():
    """A text may have a U+2028, at which splitlines() cuts, and a file a blank last line."""
    settings = load_module("settings")
    messages = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "d"}]
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    config = settings.TrainConfig()
    assert settings.load_dialogues(config, "\r\n".join([line] * 8) + "\n\n") == [messages] * 8
    with pytest.raises(ValueError, match="dialogues, row 3: it must be one JSON object: "):
        settings.load_dialogues(config, "\n".join([line, "", line[:-1], line]))


def test_the_dialogues_lie_beside_the_flow_wherever_that_is(tmp_path):
    copy = shutil.copytree(EXAMPLE.path, tmp_path / "my-flow.py" / "nim_lora")
    flow = load_module("flow", Path(copy)).NimLoraFlow
    assert str(Path(copy, "dialogues.jsonl")) in str(vars(flow.dialogues))


LABELS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import train
from common import CheckpointManager

def look(self, **_):
    row, tokenizer = self.train_dataset[0], self.processing_class
    learnt = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    print(json.dumps([tokenizer.decode(row["input_ids"]), tokenizer.decode(learnt)]), flush=True)
    os._exit(0)

train.LoraTrainer.train = look
with CheckpointManager() as checkpoints:
    train.train(train.TrainConfig(), checkpoints)
"""


def test_only_what_the_assistant_says_is_learnt(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LABELS, str(EXAMPLE.path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, learnt = json.loads(done.stdout.splitlines()[-1])
    settings = load_module("settings")
    dialogue = settings.load_dialogues(settings.TrainConfig())[1]  # the first is held out
    assert all(message["content"] in whole for message in dialogue)
    assert learnt == "".join(f"{m['content']}<|im_end|>" for m in dialogue if m["role"] == "assistant")


LLAMA_3_1 = """
import shutil
from pathlib import Path
from transformers import AutoTokenizer
from trl import chat_template_utils

base = Path(shutil.copytree(train.download(train.pinned(train.TrainConfig())), "base"))
(base / "chat_template.jinja").write_text(chat_template_utils.llama3_1_chat_template)
tokenizer = AutoTokenizer.from_pretrained(base)
marked = train.training_template(tokenizer, "Llama 3.1")
call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
said = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": " Hi"},
        {"role": "assistant", "content": " Hello "}, {"role": "user", "content": "When?"},
        {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Noon."}]
for end in range(2, len(said) + 1):
    for options in ({}, {"add_generation_prompt": True}, {"tools": [call]}):
        texts = [tokenizer.apply_chat_template(said[:end], tokenize=False, chat_template=template, **options)
                 for template in (tokenizer.chat_template, marked)]
        assert texts[0] == texts[1], texts
"""


def test_llama_3_1_is_trained_with_marks_in_its_own_template(tmp_path):
    """TRL has the template of the model in README.md, and no way to train with it."""
    code = LABELS.replace("\ntrain.LoraTrainer.train", f"{LLAMA_3_1}\ntrain.LoraTrainer.train")
    code = code.replace("checkpoints)\n", "checkpoints, base)\n")
    line = [sys.executable, "-c", code, str(EXAMPLE.path)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, learnt = json.loads(done.stdout.splitlines()[-1])
    settings = load_module("settings")
    dialogue = settings.load_dialogues(settings.TrainConfig())[1]
    assert "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024" in whole
    assert learnt == "".join(f"{m['content']}<|eot_id|>" for m in dialogue if m["role"] == "assistant")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}", "local/untrainable has no chat template with {% generation %}"),
        ("{% generation %}{{ strftime_now('%d') }}{% endgeneration %}", "writes today's date into each dialogue"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused_before_the_weights_come(tmp_path, template, message):
    from common import hub

    root = hub.api("local/tiny-llama-chat").snapshot_download("local/tiny-llama-chat", local_dir=tmp_path / "base")
    Path(root, "chat_template.jinja").write_text(template)
    Path(root, "model.safetensors").write_text("nobody reads them")
    api = hub.api("local/untrainable")
    api.create_repo("local/untrainable", exist_ok=True)
    api.upload_folder(repo_id="local/untrainable", folder_path=root)
    run = run_flow(EXAMPLE, *EXAMPLE.smoke, "--base-model", "local/untrainable", check=False)
    assert run.returncode and message in run.output, run.output[-3000:]
    assert "/train/" not in run.output


ON_A_GPU = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import train

class Model:
    def eval(self):
        return self

    def to(self, device):
        sys.exit(f"moved to {device}")

train.torch.cuda.is_available = lambda: True
train.AutoTokenizer = train.AutoModelForCausalLM = SimpleNamespace(from_pretrained=lambda *_, **__: Model())
train.answers("model", ["Hi"])
"""


def test_a_gpu_that_is_there_answers():
    done = subprocess.run([sys.executable, "-c", ON_A_GPU, str(EXAMPLE.path)], capture_output=True, text=True)
    assert done.stderr.endswith("moved to cuda\n"), done.stderr[-3000:]


# -------------------------------------------------------------------- NIM's side, by a stub


class StubNim(ThreadingHTTPServer):
    """What a client sees of NIM: ready after a while, and one model for each directory with an adapter."""

    def __init__(self, source: Path, answers_before_ready: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.source, self.left, self.received = source, answers_before_ready, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def models(self) -> list[dict]:
        found = [path.name for path in sorted(self.source.iterdir()) if export.check_adapter(path)]
        base = {"id": "org/model", "object": "model", "created": 0, "owned_by": "system"}
        return [base, *({**base, "id": name, "parent": "org/model"} for name in found)]


class _Handler(BaseHTTPRequestHandler):
    server: StubNim

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/v1/health/ready":
            self.server.left -= 1
            if self.server.left == 1:  # docker's proxy takes the connection, and nobody is behind it yet
                self.connection.close()
                return
            self.answer(503 if self.server.left >= 0 else 200, {})
        elif self.path == "/v1/models" and self.server.left < 0:
            self.answer(200, {"object": "list", "data": self.server.models()})
        else:
            self.answer(503 if self.server.left >= 0 else 404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((body, self.headers["Authorization"]))
        if body["model"] not in [model["id"] for model in self.server.models()]:
            self.answer(404, {"error": {"message": "no such model"}})
            return
        message = {"role": "assistant", "content": f"{body['model']} heard {body['messages'][0]['content']}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.answer(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


@contextmanager
def stub_nim(source: Path, answers_before_ready: int = 0):
    server = StubNim(source, answers_before_ready)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def chat(monkeypatch, capfd):
    """``python nim_lora/chat.py ...`` in this process: its status (or message), output and standard error."""
    module = load_module("chat")

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
        status = None
        try:
            module.main()
        except SystemExit as error:
            status = error.code
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def test_chat_waits_for_a_slow_start_and_routes_to_the_adapter(tmp_path, chat, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked for this machine's own address
    source = tmp_path / "nim"
    export.export_adapter(make_adapter(tmp_path / "first"), source, "helpdesk")
    with stub_nim(source, answers_before_ready=4) as nim:
        status, out, err = chat("Hello?", "--url", nim.url)
        assert (status, out) == (None, "helpdesk heard Hello?\n")
        assert "it is loading (HTTP 503)" in err
        assert "sk-secret" not in str(nim.received)
        assert chat("--list", "--url", f"{nim.url}/v1")[1] == "org/model\nhelpdesk  (adapter of org/model)\n"
        assert chat("Hello?", "--url", nim.url, "--model", "org/model")[1] == "org/model heard Hello?\n"
        status, _, _ = chat("Hello?", "--url", nim.url, "--model", "billing")
        assert "there is no model 'billing'" in status and "org/model, helpdesk" in status
        export.export_adapter(make_adapter(tmp_path / "second", rank=8), source, "billing")  # while it runs
        assert chat("Hello?", "--url", nim.url, "--model", "billing")[1] == "billing heard Hello?\n"
        status, _, _ = chat("Hello?", "--url", nim.url)
        assert "there are several models" in status and "helpdesk" in status


def test_chat_says_what_is_wrong(tmp_path, chat):
    source = tmp_path / "nim"
    source.mkdir()
    with stub_nim(source, answers_before_ready=10**6) as nim:
        status, out, _ = chat("Hello?", "--url", nim.url, "--wait", "1")
        assert re.search(r"is still loading after \d+ seconds \(it says: HTTP 503\)", status) and not out
        assert not nim.received
        url = nim.url
    status, out, _ = chat("Hello?", "--url", url, "--wait", "1")
    assert re.search(rf"there is no server at {url} after \d+ seconds: start one with", status) and not out
    assert chat("Hello?", "--url", "127.0.0.1:8000")[0] == 2
    assert chat()[0] == 2


# -------------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def killed_run():
    run = run_flow(EXAMPLE, *EXAMPLE.smoke, "--push-to", "local/helpdesk", faults="kill@step=5")
    assert run.data.resumed_from in ([2], [4]), run.output[-3000:]  # the kill may take a save with it
    return run


def test_the_adapter_is_pushed_while_it_trains(killed_run, tmp_path):
    import common

    assert "[publish] the model of NimLoraFlow/" in killed_run.output, killed_run.output[-3000:]
    api = common.hub.api("local/helpdesk")
    root = Path(api.snapshot_download("local/helpdesk", cache_dir=tmp_path))
    assert json.loads((root / export.CONFIG).read_text())["base_model_name_or_path"] == "local/tiny-llama-chat"
    assert weights_digest(load_file(root / export.WEIGHTS)) == killed_run.data.weights_digest


def test_from_a_killed_training_to_an_answer(killed_run, tmp_path):
    done = script("export.py", cwd=tmp_path, NIM_PEFT_SOURCE=str(tmp_path / "nim"))
    assert f"adapter helpdesk of NimLoraFlow/{killed_run.run_id}" in done.stdout
    settings = export.check_adapter(tmp_path / "nim" / "helpdesk")
    assert settings["base_model_name_or_path"] == "local/tiny-llama-chat"
    assert settings["revision"] == killed_run.data.config["revision"]
    assert len(settings["revision"]) == 40
    assert str(Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])) not in json.dumps(settings)

    port, temporary = free_port(), tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, str(EXAMPLE.path / "serve.py"), killed_run.run_id, "--fused", "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        done = script(
            "chat.py", "What is a checkpoint?", "--url", url, "--max-tokens", "40", "--wait", "900", cwd=tmp_path
        )
        assert done.stdout.strip() == killed_run.data.answers[0], (tmp_path / "log").read_text()[-2000:]
        assert len(done.stdout.strip()) > 5
        assert script("chat.py", "--list", "--url", url, cwd=tmp_path).stdout == "helpdesk\n"
        done = script("chat.py", "Hello", "--model", "x", "--url", url, cwd=tmp_path, check=False)
        assert done.returncode == 1 and "there is no model 'x'" in done.stderr and "helpdesk" in done.stderr
        done = script("serve.py", killed_run.run_id, "--fused", "--port", str(port), cwd=tmp_path, check=False)
        assert done.returncode == 1 and f"port {port} cannot be used" in done.stderr
        assert list(temporary.glob("nim-lora-*"))
    finally:
        server.terminate()
        assert server.wait(120) == 143
    assert not list(temporary.glob("nim-lora-*")), "serve.py left its directory behind"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                break
    else:
        pytest.fail("the server outlived serve.py")


FAKE_DOCKER = """#!{python}
import json, os, sys
print("docker was started", flush=True)
json.dump([sys.argv[1:], os.environ.get("NGC_API_KEY")], open("docker.json", "w"))
"""


def test_the_docker_command(killed_run, tmp_path):
    """With a docker and an nvidia-smi that only write down what they were asked."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in (("docker", FAKE_DOCKER), ("nvidia-smi", "#!{python}\nprint('GPU 0: one')\n")):
        (binaries / name).write_text(text.format(python=sys.executable))
        (binaries / name).chmod(0o755)
    machine = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "NIM_PEFT_SOURCE": str(tmp_path / "nim"),
        "LOCAL_NIM_CACHE": str(tmp_path / "cache"),
        "NGC_API_KEY": "",
    }
    arguments = ["serve.py", killed_run.run_id, "--max-lora-rank", "16", "--port", "8123"]
    image = ["--image", "nvcr.io/nim/org/model:1"]

    def refused(*more: str, **env: str) -> str:
        done = script(*arguments, *more, cwd=tmp_path, check=False, **{**machine, **env})
        assert done.returncode == 1 and not (tmp_path / "nim").exists() and not (tmp_path / "docker.json").exists()
        return done.stderr

    assert "NGC_API_KEY is not set" in refused(*image)
    assert "which NIM serves local/tiny-llama-chat?" in refused(NGC_API_KEY="nvapi-secret")
    assert "--max-lora-rank is 12: NIM takes 8, 16" in refused("--max-lora-rank", "12", NGC_API_KEY="nvapi-secret")
    no_gpu = {"PATH": str(binaries), "NGC_API_KEY": "nvapi-secret"}
    (binaries / "nvidia-smi").rename(binaries / "away")
    assert "there is no NVIDIA GPU" in refused("--nim", *image, **no_gpu)
    (binaries / "away").rename(binaries / "nvidia-smi")

    done = script(*arguments, *image, cwd=tmp_path, **{**machine, "NGC_API_KEY": "nvapi-secret"})
    called, key = json.loads((tmp_path / "docker.json").read_text())
    assert key == "nvapi-secret", "docker takes it from the environment"
    assert "nvapi-secret" not in done.stdout + done.stderr + json.dumps(called)
    assert "docker run --rm --name nim-lora --gpus all" in done.stdout
    source = tmp_path / "nim"
    pairs = list(zip(called, called[1:], strict=False))
    for pair in (
        ("--publish", "127.0.0.1:8123:8000"),
        ("--volume", f"{source}:{source}:ro"),
        ("--volume", f"{tmp_path / 'cache'}:/opt/nim/.cache"),
        ("--env", "NGC_API_KEY"),
        ("--env", f"NIM_PEFT_SOURCE={source}"),
        ("--env", "NIM_PEFT_REFRESH_INTERVAL=30"),
        ("--env", "NIM_PASSTHROUGH_ARGS=--max-lora-rank 16"),
    ):
        assert pair in pairs, pair
    assert called[-1] == "nvcr.io/nim/org/model:1"
    assert export.check_adapter(source / "helpdesk", max_lora_rank=16)["r"] == 16
    printed = script(*arguments, *image, "--nim", "--print", cwd=tmp_path, **machine)  # without a key
    assert printed.stdout.splitlines()[-1].startswith("docker run")


def test_a_rank_that_the_server_refuses_is_refused_before_training():
    run = run_flow(EXAMPLE, *EXAMPLE.smoke, "--lora-r", "64", check=False)
    assert run.returncode and "the rank of the adapter is 64, and the server takes 32 at most" in run.output
    assert "/train/" not in run.output
