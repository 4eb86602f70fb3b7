"""What is special about llama_factory: the training happens in a program that knows nothing of common/.

The first half watches a stand-in for such a program, which leaves behind the same files in a fraction of a second, and
runs everywhere. The second half needs LLaMA-Factory, and runs in the example's own environment.
"""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
from gallery import REPO, Example, below, run_flow

from common import CheckpointError, CheckpointManager, StopRequested
from common.foreign import ForeignTrainer, TrainerFailed, check_arguments, history, read_state
from common.manifest import Manifest

EXAMPLE = Example(REPO / "llama_factory")
needs_llama_factory = pytest.mark.skipif(
    importlib.util.find_spec("llamafactory") is None,
    reason="LLaMA-Factory has an environment of its own: make test EX=llama_factory, which make test does, too",
)

# python trainer.py STEPS SAVE_STEPS RESUME WHAT: a training program, less the training
TRAINER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
steps, save_steps, resume, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
state = json.loads(Path(resume, "trainer_state.json").read_text()) if resume else {"global_step": 0, "log_history": []}
output = Path("output")
output.mkdir()
Path("pid").write_text(str(os.getpid()))
for step in range(state["global_step"] + 1, steps + 1):
    if f"stop before {step}" == what:
        sys.exit(0)
    record = {"loss": 10 / step, "grad_norm": 3.0, "learning_rate": 0.1, "epoch": step / 4, "step": step}
    state["log_history"].append(record)
    line = {"current_steps": step, "total_steps": steps, "loss": 10 / step, "lr": 0.1, "epoch": step / 4}
    with open(output / "trainer_log.jsonl", "a") as log:
        log.write(json.dumps(line) + "\\n")
    if step % save_steps == 0 or step == steps:
        directory = output / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "adapter.txt").write_text(f"weights of step {step}")
        (directory / "training_args.bin").write_bytes(b"a pickle")
        (directory / ("rng_state_0.pth" if "two processes" in what else "rng_state.pth")).write_text("random")
        state |= {"global_step": step, "max_steps": steps, "epoch": step / 4}
        evaluation = {"eval_loss": 1.0, "eval_runtime": time.time(), "epoch": step / 4, "step": step}
        evaluations = [evaluation] if what == "evaluate" else []
        text = json.dumps(state | {"log_history": state["log_history"] + evaluations})
        if what == f"die in save {step}":
            (directory / "trainer_state.json").write_text(text[:-20])
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        (directory / "trainer_state.json").write_text(text)
    if what == f"hang after {step}":
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        Path("worker").write_text(str(worker.pid))
        time.sleep(60)
    if f"die after {step}" in what:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == f"fail after {step}":
        sys.exit("CUDA is out of memory, say")
"""


def watch(directory: Path, what: str = "", steps: int = 8, save_steps: int = 2, **options) -> ForeignTrainer:
    """One attempt with the stand-in, in ``directory``."""
    with CheckpointManager(directory / "checkpoints", **{"save_every": 1, "keep_last": 9, **options}) as checkpoints:
        resumed = checkpoints.restore_files({"of": "the test"}, total_steps=steps)
        work = checkpoints.directory / "work"
        work.mkdir()
        trainer = ForeignTrainer(checkpoints, work / "output", save_steps=save_steps, resumed=resumed)
        line = [sys.executable, "-c", TRAINER, str(steps), str(save_steps), str(resumed or ""), what]
        trainer.run(line, cwd=work)
    return trainer


def stored(directory: Path) -> dict[int, dict[str, str]]:
    """The files of each stored checkpoint, by its step."""
    found = sorted((directory / "checkpoints").glob("step-*"))
    return {int(path.name[5:]): {file.name: file.read_text() for file in path.iterdir()} for path in found}


def test_every_finished_checkpoint_is_stored_and_no_pickle(tmp_path):
    trainer = watch(tmp_path, "evaluate")
    found = stored(tmp_path)
    assert list(found) == [2, 4, 6, 8] and trainer.done
    for step, files in found.items():
        assert files["adapter.txt"] == f"weights of step {step}"
        assert "training_args.bin" not in files and "runtime" not in files["trainer_state.json"]
    assert Manifest.read(tmp_path / "checkpoints/step-00000004").metrics == {
        "loss": 2.5, "grad_norm": 3.0, "learning_rate": 0.1, "eval_loss": 1.0,
    }  # fmt: skip
    records = history(read_state(tmp_path / "checkpoints/step-00000004"))
    assert records[0] == {"step": 1, "loss": 10.0, "grad_norm": 3.0, "learning_rate": 0.1}
    assert records[-1] == {"step": 4, "epoch": 1, "eval_loss": 1.0}


def test_save_every_chooses_among_them(tmp_path):
    watch(tmp_path / "steps", save_every=3)
    assert list(stored(tmp_path / "steps")) == [4, 6, 8]  # what falls due at 3 waits for the next one
    watch(tmp_path / "time", save_every="1h")
    assert list(stored(tmp_path / "time")) == [8]  # the last is always stored
    watch(tmp_path / "epochs", save_every=None, steps=9, save_steps=3)
    assert list(stored(tmp_path / "epochs")) == [6, 9]  # the first at or after the end of an epoch of 4 steps


def test_a_half_written_checkpoint_is_never_stored(tmp_path, capsys):
    with pytest.raises(TrainerFailed, match="was killed by SIGKILL after step 4"):
        watch(tmp_path, "die in save 4")
    assert list(stored(tmp_path)) == [2]
    left = [path for path in (tmp_path / "checkpoints/.staging").rglob("checkpoint-4")]
    assert left and read_state(left[0]) is None, "the stand-in left nothing half-written: this test shows nothing"
    trainer = watch(tmp_path)
    assert trainer.done and list(stored(tmp_path)) == [2, 4, 6, 8]
    assert "resumed at step 2" in capsys.readouterr().out
    assert not [record for record in trainer._history if "grad_norm" in record], "a curve that ends at the restart"


def test_of_several_processes_all_must_have_written(tmp_path):
    """Rank 0 has written trainer_state.json, the others may not be done: a later step tells, or a good end."""
    for what, expected in (("", [1, 2]), ("two processes, ", [1])):
        with pytest.raises(TrainerFailed, match="SIGKILL"):
            watch(tmp_path / what, f"{what}die after 2", save_steps=1)
        assert list(stored(tmp_path / what)) == expected
    watch(tmp_path / "good end", "two processes", steps=2, save_steps=1)
    assert list(stored(tmp_path / "good end")) == [1, 2]


def test_a_program_that_fails_is_quoted(tmp_path):
    with pytest.raises(TrainerFailed, match="ended with status 1 after step 3(.|\n)*CUDA is out of memory, say"):
        watch(tmp_path, "fail after 3")
    with pytest.raises(TrainerFailed, match="ended early, with status 0, after step 4"):
        watch(tmp_path, "stop before 5")
    assert list(stored(tmp_path)) == [2, 4]


def test_asked_to_stop_it_stores_what_is_finished_and_ends_the_child(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS", "term@step=3")
    with pytest.raises(StopRequested, match="stopped at step 2: SIGTERM was received"):
        watch(tmp_path, "hang after 3", save_every="1h")
    assert list(stored(tmp_path)) == [2]
    (pid,) = (tmp_path / "checkpoints/.staging").rglob("pid")
    assert not Path("/proc", pid.read_text()).exists()
    monkeypatch.delenv("FAULTS")
    assert watch(tmp_path).done


def test_a_fault_comes_before_the_step_is_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS", "raise@step=4")
    with pytest.raises(Exception, match="FAULTS"):
        watch(tmp_path)  # the program itself is long done with step 8
    assert list(stored(tmp_path)) == [2]


ATTEMPT = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import common.foreign, test_llama_factory
common.foreign._MARK = {mark!r}
{sabotage}
test_llama_factory.watch(Path("."), sys.argv[1])
"""


def lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


@pytest.mark.parametrize(
    ("sabotage", "orphans"),
    [
        ("", [False, False]),
        ("common.foreign.die_with_parent = print", [True, False]),  # the negative controls: without each of the two
        ("common.foreign._end_orphans = list", [False, True]),
    ],
)
def test_nothing_of_a_killed_task_lives_on(tmp_path, sabotage, orphans):
    """The program dies with its task; a worker that it has started, at the latest when the next attempt starts."""
    mark = f"OF_{uuid.uuid4().hex}"  # of its own: a test beside this one ends the orphans it finds, too
    code = ATTEMPT.format(path=[str(REPO / "tests")], mark=mark, sabotage=sabotage)
    with subprocess.Popen([sys.executable, "-c", code, "hang after 3"], cwd=tmp_path) as task:
        deadline = time.monotonic() + 60
        while not (found := below(tmp_path, "worker")) or not found[0].read_text():
            assert time.monotonic() < deadline and task.poll() is None
            time.sleep(0.05)
        pids = [int((found[0].parent / name).read_text()) for name in ("pid", "worker")]
        task.kill()
    time.sleep(0.3)
    try:
        assert lives(pids[1]), "the worker ended by itself: this test shows nothing"
        survived = lives(pids[0])
        subprocess.run([sys.executable, "-c", code, "stop before 1"], cwd=tmp_path, stderr=subprocess.DEVNULL)
        time.sleep(0.1)
        assert [survived, lives(pids[1])] == orphans
    finally:
        for pid in filter(lives, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_strategy": "epoch"}, "save_strategy is epoch, .* must be steps"),
        ({"eval_strategy": "epoch"}, "eval_strategy is epoch, .* must be no or steps"),
        ({"save_only_model": True}, "optimizer, schedule and random state would be lost"),
        ({"load_best_model_at_end": True}, "use keep_best"),
        ({"save_total_limit": 2}, "keep_last decides"),
        ({"enable_jit_checkpoint": True}, "in the middle of a step"),
        ({"trust_remote_code": True}, "runs code that comes with the model"),
        ({"save_steps": 0.1}, "save_steps is 0.1: give a number of steps"),
        ({"save_steps": 10, "logging_steps": 4}, "Make save_steps a multiple of logging_steps"),
    ],
)
def test_what_cannot_be_continued_exactly_is_refused(arguments, message):
    check_arguments({"save_steps": 10, "logging_steps": 5, "eval_strategy": "steps"})
    with pytest.raises(CheckpointError, match=message):
        check_arguments(arguments)


# ---------------------------------------------------------------- with LLaMA-Factory


def module(name: str):
    """A file of the example."""
    sys.path.insert(0, str(EXAMPLE.path))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLE.path))


ONE_ATTEMPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {example!r})
from common import CheckpointManager
from train import TrainConfig, train
with CheckpointManager("checkpoints", save_every=1) as checkpoints:
    {sabotage}
    result = train(TrainConfig(**{config!r}), checkpoints)
os.rename(result.path, "model")
print("weights", result.weights_digest)
"""
WITHOUT_OPTIMIZER = """
    restore = checkpoints.restore_files
    def without_optimizer(*arguments, **options):
        found = restore(*arguments, **options)
        (found / "optimizer.pt").unlink(missing_ok=True) if found else None
        return found
    checkpoints.restore_files = without_optimizer
"""
CONFIG = EXAMPLE.toml["train"]["config"]


def attempt(
    directory: Path, kill_child_at: int | None = None, sabotage: str = "pass", steps: int = 4, **environment: str
):
    """``train`` in a process of its own, whose child is killed when the log has that step: its status and output."""
    directory.mkdir(exist_ok=True)
    config = {**CONFIG, "overrides": {**CONFIG["overrides"], "max_steps": steps}}
    code = ONE_ATTEMPT.format(example=str(EXAMPLE.path), config=config, sabotage=sabotage.strip())
    line, env = [sys.executable, "-c", code], {**os.environ, **environment}
    with subprocess.Popen(line, cwd=directory, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as task:
        while kill_child_at and task.poll() is None:
            logs = []
            with suppress(FileNotFoundError):  # the training deletes its directories, too
                logs += [log.read_text() for log in below(directory, "trainer_log.jsonl")]
            if any(f'"current_steps": {kill_child_at},' in log for log in logs):
                for child in Path(f"/proc/{task.pid}/task/{task.pid}/children").read_text().split():
                    with suppress(ProcessLookupError):
                        os.kill(int(child), signal.SIGKILL)
                break
            time.sleep(0.005)
        output = task.communicate()[0].decode()
    return task.returncode, output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The model of a training that was left alone; with the real command, not with one that tests have forked."""
    directory = tmp_path_factory.mktemp("straight")
    path = os.environ["PATH"].split(os.pathsep)
    real = os.pathsep.join(place for place in path if not Path(place).name.startswith("preforked-"))
    code, output = attempt(directory, PATH=real)
    assert code == 0, output[-3000:]
    return directory / "model"


@needs_llama_factory
def test_the_child_alone_is_killed(tmp_path):
    """As when the machine runs out of memory: each attempt fails with a word about it, and the last one is exact."""
    steps = 24  # it is killed long before it ends, however late that is seen
    code, output = attempt(tmp_path / "straight", steps=steps)
    assert code == 0, output[-3000:]
    for step in (1, 2):
        code, output = attempt(tmp_path / "run", kill_child_at=step, steps=steps)
        assert code == 1 and "was killed by SIGKILL after step" in output, output[-3000:]
    code, output = attempt(tmp_path / "run", steps=steps)
    assert code == 0, output[-3000:]
    assert "resumed at step" in output
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (tmp_path / "run/model" / name).read_bytes() == (tmp_path / "straight/model" / name).read_bytes(), name


@needs_llama_factory
def test_without_the_optimizer_it_would_be_noticed(tmp_path, uninterrupted):
    """The negative control: LLaMA-Factory resumes without a word, and ends elsewhere."""
    code, output = attempt(tmp_path / "run", FAULTS="term@step=2")
    assert code == 1 and "stopped at step 2: SIGTERM" in output, output[-3000:]
    code, output = attempt(tmp_path / "run", sabotage=WITHOUT_OPTIMIZER)
    assert code == 0 and "resumed at step 2" in output, output[-3000:]
    name = "adapter_model.safetensors"
    assert (tmp_path / "run/model" / name).read_bytes() != (uninterrupted / name).read_bytes()


@needs_llama_factory
def test_a_sweep_resumes_one_by_one(uninterrupted):
    """Each training of the grid is killed and goes on where it stood; one of them is the training of these tests."""
    from safetensors.torch import load_file

    from common import weights_digest

    smoke = [word if word != "8" else "4,8" for word in EXAMPLE.smoke]
    run = run_flow(EXAMPLE, *smoke, faults="kill@step=3")
    assert run.fired() == ["kill@step=3"] * 2
    assert len(run.data.resumed_from) == 2 and set(run.data.resumed_from) <= {1, 2}  # the kill may take a save with it
    from metaflow import Run

    tasks = {task.data.rank: task.data for task in Run(f"{run.flow_name}/{run.run_id}")["train"]}
    assert sorted(tasks) == [4, 8] and tasks[4].weights_digest != tasks[8].weights_digest
    assert tasks[8].weights_digest == weights_digest(load_file(uninterrupted / "adapter_model.safetensors"))
    shown = run.card_data("train")
    assert "eval_loss" in shown and "learning_rate" in shown and "interrupted once" in shown
    adapter = json.loads((uninterrupted / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "local/tiny-qwen-chat" and adapter["revision"] == run.data.commit
    assert run.data.answer is not None and "rank 4: eval_loss" in run.output


@needs_llama_factory
@pytest.mark.parametrize("file", sorted(path.name for path in EXAMPLE.path.glob("*.yaml")))
def test_llama_factory_knows_every_key(file):
    """Also of the configurations that need GPUs, which no test can run."""
    import dataclasses

    import yaml
    from llamafactory.hparams import parser

    arguments = yaml.safe_load((EXAMPLE.path / file).read_text())
    classes = parser._TRAIN_ARGS if file.startswith("train") else parser._INFER_ARGS
    known = {field.name for kind in classes for field in dataclasses.fields(kind)}
    assert set(arguments) <= known, f"{file}: {set(arguments) - known}"
    if file.startswith("train"):
        config = module("train").TrainConfig(file)
        assert config.data_files() and config.arguments["save_steps"] % config.arguments["logging_steps"] == 0
        if "deepspeed" in arguments:
            settings = json.loads(config.path("deepspeed").read_text())
            assert settings["zero_optimization"]["stage"] == 2 and settings["train_batch_size"] == "auto"


@needs_llama_factory
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nothing.yaml"], "name a YAML file beside train.py"),
        (["--overrides", "lora_rank"], "'lora_rank' is not followed by =value"),
        (["--overrides", "output_dir=x"], "sets output_dir: leave it out"),
        (["--overrides", "stage=ppo"], "LLaMA-Factory resumes sft, pt, dpo, kto only"),
        (["--overrides", "dataset=alpaca"], "dataset is 'alpaca': dataset_info.json names no file"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    train, options = module("train"), dict(zip(arguments[::2], arguments[1::2], strict=True))
    with pytest.raises(CheckpointError, match=message):
        train.TrainConfig(options.get("--config", "train.yaml"), train.parse_overrides(options.get("--overrides", "")))


@needs_llama_factory
def test_a_grid_needs_something_to_choose_by_and_a_rank():
    config = module("train").TrainConfig
    for ranks, overrides, message in (
        ([4, 8], {"eval_strategy": False}, r"--ranks is \[4, 8\], and no training would log the eval_loss"),
        ([4, 8], {"eval_on_each_dataset": True}, "without eval_on_each_dataset, or give one rank"),
        ([8], {"finetuning_type": "full"}, r'--ranks is \[8\] and finetuning_type is full.*say --ranks ""'),
    ):
        with pytest.raises(CheckpointError, match=message):
            config(overrides=overrides).check_ranks(ranks)
    config().check_ranks([4, 8])
    config(overrides={"finetuning_type": "full"}).check_ranks([])
    unquoted = config(overrides={"eval_strategy": False})  # how YAML reads no
    unquoted.check_ranks([8])
    assert unquoted.arguments["eval_strategy"] == "no"
    with pytest.raises(CheckpointError, match="save_strategy is no, .* must be steps"):
        config(overrides={"save_strategy": False})
    run = run_flow(EXAMPLE, "--overrides", "eval_strategy=no", check=False)
    assert run.returncode and "no training would log the eval_loss" in run.output and "/train/" not in run.output


@needs_llama_factory
def test_what_the_configuration_names_is_part_of_it(tmp_path):
    copy = Path(shutil.copytree(EXAMPLE.path, tmp_path / "copy"))
    config = module("train").TrainConfig(str(copy / "train_deepspeed.yaml"))
    seen = [config.fingerprint()]
    for name in ("dataset/questions.json", "dataset/dataset_info.json", "deepspeed_zero2.json"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        seen.append(config.fingerprint())
        assert seen[-1] != seen[-2], name
    (copy / "deepspeed_zero2.json").unlink()
    with pytest.raises(CheckpointError, match="deepspeed is 'deepspeed_zero2.json': there is no /"):
        module("train").TrainConfig(config.file)


COMMAND = """#!/bin/sh
mkdir -p merged && cp "$2" "$(dirname "$0")" && printf 'Assistant: yes\nUser: '
"""


@needs_llama_factory
def test_a_model_is_merged_and_asked_as_it_was_trained(tmp_path, monkeypatch):
    """With the template of its configuration, and in the dtype of its base."""
    import yaml

    for name, file, text in (
        ("bin", "llamafactory-cli", COMMAND), ("adapter", "adapter_config.json", "{}"),
        ("base", "config.json", '{"torch_dtype": "bfloat16"}'), ("model", "config.json", '{"dtype": "float32"}'),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    (tmp_path / "bin/llamafactory-cli").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    use, config = module("use_model"), module("train").TrainConfig(overrides={"template": "llama3"})
    use.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", config.for_chat())
    assert use.ask(tmp_path / "model", "Is it?", config.for_chat()) == "yes"
    for file, dtype in (("merge.yaml", "bfloat16"), ("infer.yaml", "float32")):
        keys = yaml.safe_load((tmp_path / "bin" / file).read_text())
        assert (keys["template"], keys["infer_dtype"]) == ("llama3", dtype)


@needs_llama_factory
def test_all_weights_are_trained_and_nothing_is_evaluated():
    """There is no adapter to merge then, and nothing to choose."""
    overrides = EXAMPLE.smoke[EXAMPLE.smoke.index("--overrides") + 1]
    run = run_flow(EXAMPLE, "--ranks", "", "--overrides", f"{overrides} finetuning_type=full eval_strategy=no")
    assert "rank of the file: no eval_loss" in run.output and run.data.answer is not None
