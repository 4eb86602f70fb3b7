"""What is special about lora_huggingface/: its configuration, its data, and what it leaves behind."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gallery import REPO, Example, FlowRun, run_flow

import common
from common import CheckpointManager, FaultInjected

EXAMPLE = Example(REPO / "lora_huggingface")
pytestmark = pytest.mark.xdist_group(EXAMPLE.name)
MODULES = ("settings", "instructions", "train")  # import each other by these names, which other examples have, too


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The example's files, imported late and forgotten again: every worker collects this file."""
    sys.path.insert(0, str(EXAMPLE.path))
    before = {name: sys.modules.pop(name, None) for name in MODULES}
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(EXAMPLE.path))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def settings(modules):
    return modules["settings"]


@pytest.fixture(scope="module")
def instructions(modules):
    return modules["instructions"]


@pytest.fixture(scope="module")
def lora(modules):
    return modules["train"]


@pytest.fixture(scope="module")
def world(lora) -> tuple[Any, Path, list]:
    """The configuration with its commits, the base model and the rows."""
    config = lora.pinned(lora.TrainConfig(epochs=2, batch_size=64, micro_batch_size=32))
    return config, *lora.download(config)


# ------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    "text, message",
    [
        ("lora_rank: 8", "'lora_rank' is not a setting: did you mean 'lora_r'?"),
        ("lora_r: 8.5", "lora_r is 8.5, a float: it must be int"),
        ("lora_r: '8'", "lora_r is '8', a str: it must be int"),
        ("epochs: true", "epochs is True, a bool: it must be int"),
        ("learning_rate: fast", "learning_rate is 'fast', a str: it must be float"),
        ("learning_rate: .nan", "learning_rate is nan: it must be greater than 0"),
        ("merge: 1", "merge is 1, a int: it must be bool"),
        ("lora_target_modules: q_proj", "lora_target_modules is 'q_proj', a str: it must be a list of texts"),
        ("lora_target_modules: []", "lora_target_modules is empty"),
        ("lora_r: 4\nlora_r: 8", "'lora_r' is set 2 times"),
        ("cutoff_len: -1", "cutoff_len is -1: it must be greater than 0"),
        ("batch_size: 10\nmicro_batch_size: 4", "batch_size is 10: it must be a multiple of micro_batch_size, 4"),
        ("prompt_template: vicuna", "prompt_template is 'vicuna': choose one of chat, alpaca"),
        ("- lora_r", "the configuration is a list"),
        ("lora_r: [", "the configuration is not YAML"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(settings, text, message):
    with pytest.raises(ValueError) as refused:
        settings.parse(text)
    assert message in str(refused.value)


def test_the_configuration_files(settings):
    """config.yaml has every knob with its default; the other one is valid, with a number that YAML takes for a text."""
    shipped = (EXAMPLE.path / "config.yaml").read_text()
    assert settings.parse(shipped) == settings.parse("") == dataclasses.asdict(settings.TrainConfig())
    for name in settings.parse(""):
        assert f"\n{name}: " in shipped, f"config.yaml does not show {name}"
    assert settings.parse((EXAMPLE.path / "alpaca.yaml").read_text())["learning_rate"] == 2e-4


def test_the_flow_refuses_it_before_a_run_exists(tmp_path):
    (tmp_path / "my.yaml").write_text("lora_rank: 8\n")
    run = run_flow(EXAMPLE, top=("--config", "settings", str(tmp_path / "my.yaml")), check=False)
    assert run.returncode and not run.run_id
    assert "'lora_rank' is not a setting: did you mean 'lora_r'?" in run.output and "Traceback" not in run.output


def test_the_flow_finds_its_files_in_any_directory(tmp_path):
    unwanted = shutil.ignore_patterns("checkpoints")
    there = shutil.copytree(EXAMPLE.path, tmp_path / "my-flow.py" / "lora", ignore=unwanted)
    (there.parent / "common").symlink_to(REPO / "common")
    line = [sys.executable, str(there / "flow.py"), "show"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_target_that_the_model_does_not_have_is_refused(lora, world):
    """PEFT itself would train the others and say nothing."""
    config, base, _ = world
    config = dataclasses.replace(config, lora_target_modules=["q_proj", "qkv_proj"])
    with pytest.raises(ValueError, match="local/tiny-llama-chat has no module qkv_proj"):
        lora.add_adapter(config, lora.load_base(config, base))


@pytest.fixture(scope="module")
def tied(world, tmp_path_factory) -> Path:
    """A base model like the other, but with one matrix for lm_head and embed_tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("tied")
    config = AutoConfig.from_pretrained(world[1])
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(world[1]).save_pretrained(directory)
    return directory


def test_targets_that_share_their_weights_are_refused(settings, world, tied):
    config, base, _ = world
    settings.check_targets(config, base)  # these do not
    with pytest.raises(ValueError, match="lora_target_modules has lm_head, but in local/tiny-llama-chat lm_head and"):
        settings.check_targets(config, tied)
    settings.check_targets(dataclasses.replace(config, lora_target_modules=["q_proj"]), tied)
    settings.check_targets(dataclasses.replace(config, lora_target_modules=["all-linear"]), tied)  # PEFT omits lm_head


def test_the_flow_refuses_them_before_the_model_is_loaded(tied):
    api = common.hub.api("local/tied")
    api.create_repo("local/tied", exist_ok=True)
    api.upload_folder(repo_id="local/tied", folder_path=tied)
    run = run_flow(EXAMPLE, "--base-model", "local/tied", check=False)
    assert run.returncode and "one matrix (tie_word_embeddings)" in run.output, run.output[-3000:]
    assert run.output.count("Task is starting") == 1, "it was tried again, or got further"


@pytest.mark.parametrize("right", [True, False])
def test_a_merged_model_that_is_another_one_is_noticed(lora, world, tied, tmp_path, right):
    import torch

    config, base, rows = world
    base = base if right else tied
    adapted = lora.add_adapter(config, lora.load_base(config, base))
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.1)  # else a new adapter changes nothing
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = lora.merge(config, base, tmp_path / "adapter", tmp_path / "merged")
    arguments = (config, base, tmp_path / "adapter", rows, lora.prepare(config, rows, base), merged)
    if right:
        assert len(lora.evaluate(*arguments, samples=1)["samples"]) == 1
    else:
        with pytest.raises(ValueError, match="the logits of the merged model differ by [0-9.]+% from those of"):
            lora.evaluate(*arguments, samples=1)


# ------------------------------------------------------------ data


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_loss_is_on_answers_only(instructions, world, template):
    config, base, rows = world
    config = dataclasses.replace(config, prompt_template=template)
    data, tokenizer = instructions.prepare(config, rows, base), instructions.load_tokenizer(base)
    seen = []
    for validation in (True, False):
        examples = instructions.Examples(config, data, validation=validation)
        seen.append(set(examples.rows))
        for row, example in zip(examples.rows, examples, strict=True):
            ids, labels = example["input_ids"], example["labels"]
            learnt = [label for label in labels if label != instructions.IGNORED]
            assert tokenizer.decode(learnt) == rows[row]["output"] + tokenizer.eos_token
            assert (
                labels == [instructions.IGNORED] * (len(ids) - len(learnt)) + learnt and ids[-len(learnt) :] == learnt
            )
            prompt = tokenizer.decode(ids[: -len(learnt)])
            assert rows[row]["instruction"] in prompt and rows[row]["input"] in prompt
    assert len(seen[0]) == config.val_set_size and not seen[0] & seen[1] and len(seen[0] | seen[1]) == len(rows)


def test_an_alpaca_prompt_begins_with_the_bos_token_once(instructions, world):
    """As the chat templates of the models that have one."""
    config, base, rows = world
    config, tokenizer = dataclasses.replace(config, prompt_template="alpaca"), instructions.load_tokenizer(base)
    before = instructions.tokenize(config, tokenizer, rows[:1])["tokens"]
    tokenizer.bos_token = "<|im_start|>"
    after = instructions.tokenize(config, tokenizer, rows[:1])["tokens"]
    assert after.tolist() == [tokenizer.bos_token_id, *before]


def test_what_cutoff_len_leaves_without_an_answer_is_left_out(instructions, world, capsys):
    config, base, rows = world
    config = dataclasses.replace(config, cutoff_len=50)
    data = instructions.prepare(config, rows, base)
    examples = instructions.Examples(config, data, validation=False)
    lost = int((data["lengths"] == 0).sum())
    assert 0 < lost < len(rows) and f"{lost} of {len(rows)} rows are left out" in capsys.readouterr().out
    assert all(max(example["labels"]) >= 0 and len(example["input_ids"]) <= 50 for example in examples)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": "a"}', "my.jsonl, row 2: it needs an instruction"),
        ('[{"instruction": "a", "output": 3}]', "my.jsonl, row 1: it needs an instruction and an output, both texts"),
        ("{", "my.jsonl is neither JSON nor JSON Lines"),
        ("", "there are no instructions"),
    ],
)
def test_bad_rows_are_refused_by_file_and_number(instructions, text, message):
    with pytest.raises(ValueError, match=message):
        instructions.read_rows({"my.jsonl": text})


def test_lines_end_at_newlines_only(instructions):
    text = "one\u2028two\x85three"
    line = json.dumps({"instruction": text, "output": "b"}, ensure_ascii=False)
    assert [row["instruction"] for row in instructions.read_rows({"my.jsonl": f"{line}\r\n{line}\n\n"})] == [text] * 2


def test_checkpoints_beside_the_instructions_are_no_instructions(lora, world, tmp_path, monkeypatch):
    """The second ``python train.py`` in the example's own directory."""
    config, _, rows = world
    (tmp_path / "instructions.jsonl").write_bytes((EXAMPLE.path / "instructions.jsonl").read_bytes())
    (tmp_path / "checkpoints" / "adapter" / "events").mkdir(parents=True)
    (tmp_path / "checkpoints" / "adapter" / "events" / "0.jsonl").write_text('{"event": "started"}\n')
    monkeypatch.setattr(lora, "HERE", tmp_path)
    assert lora.download(config)[1] == rows


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import instructions, settings
from common import CheckpointManager
from pathlib import Path

def fill(*arguments, done=[]):
    done.append(1)
    if len(done) == 120:  # in the middle of the third shard
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

original, instructions.fill = instructions.fill, fill
rows = instructions.read_rows(instructions.json_files(Path(sys.argv[1])))
config = settings.TrainConfig(revision=sys.argv[4], dataset_revision="")
with CheckpointManager(sys.argv[3]) as checkpoints:
    instructions.prepare(config, rows, Path(sys.argv[2]), checkpoints)
"""


def test_killed_in_mid_shard_no_finished_one_is_tokenized_again(instructions, world, tmp_path, monkeypatch):
    config, base, rows = world
    line = [sys.executable, "-c", KILLED, str(EXAMPLE.path), str(base), str(tmp_path / "kept"), config.revision]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]

    original, filled = instructions.fill, []
    monkeypatch.setattr(instructions, "fill", lambda *arguments: (filled.append(1), original(*arguments))[1])
    # the steps of the training are not those of the preparation
    monkeypatch.setenv("FAULTS", ";".join(f"raise@step={n}" for n in range(1, 8)))

    def prepare(**options: Any) -> tuple[dict, int]:
        filled.clear()
        with CheckpointManager(tmp_path / "kept", **options) as checkpoints:
            return instructions.prepare(config, rows, base, checkpoints), len(filled)

    data, again = prepare()
    assert again == len(rows) - 2 * config.shard_size
    assert instructions.fingerprint_of(data) == instructions.fingerprint_of(instructions.prepare(config, rows, base))
    assert prepare()[1] == 0, "a finished preparation did something again"

    with open(tmp_path / "kept" / "shard-000002" / "shard.safetensors", "r+b") as file:
        file.truncate(100)
    mended, again = prepare()
    assert again == config.shard_size and instructions.fingerprint_of(mended) == instructions.fingerprint_of(data)
    assert prepare(fresh=True)[1] == len(rows), "the negative control: without its shards it starts anew"


# ------------------------------------------------------------ training


@pytest.mark.parametrize("loaded, dtype", [(True, "float32"), (True, "bfloat16"), (False, "float32")])
def test_the_adapter_is_restored(lora, world, tmp_path, monkeypatch, loaded, dtype):
    """And the negative control: the same without its weights ends with others."""
    config, base, rows = world
    config, digests = dataclasses.replace(config, epochs=1, dtype=dtype), []
    data = lora.prepare(config, rows, base)
    for place, faults in (("straight", ""), ("killed", "raise@step=3")):
        monkeypatch.setenv("FAULTS", faults)
        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                if not loaded:
                    patch.setattr(lora.LoraTrainer, "_load_from_checkpoint", lambda *arguments: None)
                try:
                    with CheckpointManager(tmp_path / place, save_every=1) as checkpoints:
                        result = lora.finetune(config, base, data, checkpoints)
                except FaultInjected:
                    continue
            digests.append(result.weights_digest)
            break
    assert checkpoints.resumed_from == [2]
    assert (digests[0] == digests[1]) == loaded


def test_a_checkpoint_has_the_adapter_only(lora, world, tmp_path):
    """Files of a checkpoint and of the model, for a Llama of four million weights; the ratio falls with the size."""
    import transformers

    config, base, rows = world
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024,
                                 num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = dataclasses.replace(config, epochs=1, lora_target_modules=["q_proj", "v_proj"], batch_size=8,
                                 micro_batch_size=8, val_set_size=8)  # fmt: skip
    data = lora.prepare(config, rows[:24], tmp_path / "base")
    with CheckpointManager(tmp_path / "checkpoints") as checkpoints:
        lora.finetune(config, tmp_path / "base", data, checkpoints)
    files = {path.name: path.stat().st_size for path in Path(checkpoints.latest).iterdir()}
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json", "optimizer.pt",
        "rng_state.pth", "running_totals.json", "scheduler.pt", "trainer_state.json",
    }  # fmt: skip
    ratio = sum(files.values()) / (tmp_path / "base" / "model.safetensors").stat().st_size
    print(f"a checkpoint is {ratio:.2%} of its base model")
    assert ratio < 0.03  # 2.47% was measured


# ------------------------------------------------------------ the flow


def test_without_a_merged_model():
    run = run_flow(EXAMPLE, *EXAMPLE.smoke, "--epochs", "1", "--merge", "false")
    assert run.data.perplexity_after < run.data.perplexity_before and "merged" not in run.data


@pytest.fixture(scope="module")
def killed_run(lora) -> FlowRun:
    """With a data set of a hub; killed while it writes the third shard, and while it writes the third checkpoint."""
    api = common.hub.api("local/questions")
    api.create_repo("local/questions", repo_type="dataset", exist_ok=True)
    api.upload_file(path_or_fileobj=EXAMPLE.path / "instructions.jsonl", path_in_repo="data/train.jsonl",
                    repo_id="local/questions", repo_type="dataset")  # fmt: skip
    arguments = (*EXAMPLE.smoke, "--dataset", "local/questions", "--push-to", "local/answers")
    return run_flow(EXAMPLE, *arguments, faults="kill@save=3")


def test_the_flow_is_killed_in_both_steps_and_ends_the_same(lora, killed_run, tmp_path):
    for step in ("prepare", "train"):
        fired = [event["fault"] for event in killed_run.events(step) if event["event"] == "fault"]
        assert fired == ["kill@save=3"], f"{step}: {fired}\n{killed_run.output[-3000:]}"
    assert "found 2 checkpoints; resumed at step 2" in killed_run.output
    assert killed_run.output.count("shard 3/7  50 rows") == killed_run.output.count("shard 2/7  50 rows") == 1
    config = lora.TrainConfig(**killed_run.data.config)
    base, rows = lora.download(config)
    data = lora.prepare(config, rows, base)
    with CheckpointManager(tmp_path, keep_best=("eval_loss", "min")) as checkpoints:
        result = lora.finetune(config, base, data, checkpoints)
    assert result.weights_digest == killed_run.data.weights_digest and result.history == killed_run.data.history


def test_perplexity_falls_and_the_card_shows_answers(killed_run):
    """3261.6 -> 70.4 was measured."""
    before, after = killed_run.data.perplexity_before, killed_run.data.perplexity_after
    assert before > 1000 and after < 120
    card = killed_run.card_data("evaluate")
    assert f"{before:.1f} -&gt; {after:.1f}" in card or f"{before:.1f} -> {after:.1f}" in card
    for sample in killed_run.data.samples:
        assert json.dumps(sample["instruction"])[1:-1] in card and sample["after"] != sample["before"]


def test_adapter_and_merged_model_have_their_lineage_and_agree(lora, killed_run, tmp_path):
    import torch
    from metaflow import load_model
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = killed_run.data
    commits = {
        "base_model": "local/tiny-llama-chat", "base_commit": common.hub.resolve("local/tiny-llama-chat"),
        "dataset": "local/questions",
        "dataset_commit": common.hub.resolve("local/questions", repo_type="dataset"),
    }  # fmt: skip
    for reference in (data.adapter, data.merged):
        lineage = reference["metadata"]
        assert {name: lineage[name] for name in commits} == commits
        assert lineage["adapter_digest"] == data.weights_digest and len(lineage["data_fingerprint"]) == 16
    load_model(data.adapter, str(tmp_path / "adapter"))
    load_model(data.merged, str(tmp_path / "merged"))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (commits["base_model"], commits["base_commit"])
    for file in (tmp_path / "adapter").iterdir():  # no directory of this machine
        assert str(Path(os.environ["METAFLOW_HOME"]).parent).encode() not in file.read_bytes()

    base, _ = lora.download(lora.TrainConfig(**data.config))  # into the Hub's cache, where AutoPeftModel finds it
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = tokenizer("What is 3 times 7?", return_tensors="pt")
    models = (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        AutoModelForCausalLM.from_pretrained(base),
    )
    with torch.no_grad():
        adapted, merged, untrained = (model.eval()(**prompt).logits for model in models)
    torch.testing.assert_close(adapted, merged, atol=1e-3, rtol=1e-3)
    assert (adapted - untrained).abs().max() > 1, "the adapter changes nothing"


def test_a_pushed_run_loads_and_generates(lora, killed_run, tmp_path):
    """While it trained, and with the command afterwards, which finds everything there."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    assert "[publish] the model of LoraHuggingFaceFlow/" in killed_run.output, killed_run.output[-3000:]
    line = [sys.executable, "-m", "common", "push", f"LoraHuggingFaceFlow/{killed_run.run_id}@lora_adapter",
            "local/answers", "--json"]  # fmt: skip
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    api = common.hub.api("local/answers")
    assert api.repo_info("local/answers").private
    root = Path(api.snapshot_download("local/answers", cache_dir=tmp_path))
    pushed = json.loads(done.stdout)
    assert not {name for name in pushed["files"] if name.endswith(".safetensors")}, "the weights were there already"
    assert not {path.name for path in root.rglob("*")} & {"training_args.bin", "optimizer.pt", "manifest.json"}
    card = (root / "README.md").read_text()
    for words in ("local/tiny-llama-chat", "local/questions", killed_run.data.config["revision"], "lora_alpha",
                  "AutoPeftModelForCausalLM", "eval_loss", f"LoraHuggingFaceFlow/{killed_run.run_id}"):  # fmt: skip
        assert words in card, f"{words} is missing in\n{card}"
    lora.download(lora.TrainConfig(**killed_run.data.config))  # into the Hub's cache, where AutoPeftModel finds it
    model = AutoPeftModelForCausalLM.from_pretrained(root)
    weights = {name: value for name, value in model.state_dict().items() if "lora" in name}
    assert weights, "no adapter"
    adapter = model.peft_config["default"]
    tokenizer = AutoTokenizer.from_pretrained(adapter.base_model_name_or_path, revision=adapter.revision)
    prompt = tokenizer("What is 3 times 7?", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
