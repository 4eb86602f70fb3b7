"""What is special about mnist_huggingface/ and common.transformers: what the Trainer would lose, what is refused."""

import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gallery import REPO, Example, run_flow

from common import CheckpointError, CheckpointManager, FaultInjected, Publisher, weights_digest
from common.loopback_hub import LoopbackHub
from common.manifest import Manifest

pytestmark = pytest.mark.xdist_group("mnist_huggingface")
EXAMPLE = REPO / "mnist_huggingface"


def load(name: str) -> ModuleType:
    """A file of the example, by a name that no other example's has."""
    spec = importlib.util.spec_from_file_location(f"mnist_huggingface_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hf() -> ModuleType:
    """transformers, imported late: it takes seconds, and every worker collects this file."""
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    gc.freeze()  # Trainer collects garbage at every start, which takes half a second of each training here
    return module


@pytest.fixture(scope="module")
def digits(hf: ModuleType) -> ModuleType:
    return load("train")


@pytest.fixture(scope="module")
def adapter(hf: ModuleType) -> ModuleType:
    import common.transformers

    return common.transformers


# ------------------------------------------------------------ a tiny ViT, three epochs of four steps

STEPS, EPOCHS = 4, 3


class Samples:
    """16 random images; with ``noise``, of one kind or another, on each."""

    def __init__(self, noise: Callable[[Any, int, int], Any] | None = None) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self.images, self.epoch, self.noise = torch.randn(16, 1, 8, 8, generator=generator), 0, noise or by_index

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {"pixel_values": image + 0.1 * self.noise(image, self.epoch, index), "labels": index % 3}


def by_index(image: Any, epoch: int, index: int) -> Any:
    import torch

    return torch.randn(image.shape, generator=torch.Generator().manual_seed(1000 * epoch + index))


def by_global_state(image: Any, epoch: int, index: int) -> Any:
    import torch

    return torch.randn(image.shape)


def tiny_vit(hf: ModuleType) -> Any:
    import torch

    torch.manual_seed(0)
    return hf.ViTForImageClassification(
        hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
                     patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.1, initializer_range=0.2)
    )  # fmt: skip


def tiny_resnet(hf: ModuleType) -> Any:
    """Its keys round-trip."""
    import torch

    torch.manual_seed(0)
    config = hf.ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=3)
    return hf.ResNetForImageClassification(config)


def arguments(hf: ModuleType, output: Path, **changes: Any) -> Any:
    options: dict[str, Any] = dict(
        num_train_epochs=EPOCHS, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="cosine",
        eval_strategy="epoch", logging_steps=3, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    return hf.TrainingArguments(str(output), **{**options, **changes})


@dataclasses.dataclass
class Fit:
    """Trains in a directory of checkpoints, and again if a fault ended it."""

    hf: ModuleType
    adapter: ModuleType
    directory: Path
    monkeypatch: pytest.MonkeyPatch

    def __call__(
        self,
        place: str,
        faults: str = "",
        *,
        dataset: Any = None,
        model: Any = None,
        callbacks: tuple[Any, ...] = (),
        trainer_class: Any = None,
        manager: dict[str, Any] | None = None,
        again: Callable[[], None] = lambda: None,
        total_steps: int | None = None,
        **changes: Any,
    ) -> tuple[dict[str, Any], Any, list[int]]:
        """The outcome to compare, the trainer, and the steps that it resumed from."""
        self.monkeypatch.setenv("FAULTS", faults)
        for attempt in range(3):
            try:
                return self._attempt(place, dataset, model, callbacks, trainer_class, manager, total_steps, changes)
            except FaultInjected:
                assert attempt < 2
                again()
        raise AssertionError("unreachable")

    def _attempt(self, place, dataset, model, callbacks, trainer_class, manager, total_steps, changes):
        with CheckpointManager(self.directory / place, **{"save_every": 1, **(manager or {})}) as checkpoints:
            callback = self.adapter.CheckpointCallback(checkpoints)
            trainer = (trainer_class or self.adapter.ResumableTrainer)(
                (model or tiny_vit)(self.hf),
                arguments(self.hf, checkpoints.directory / "trainer", **changes),
                train_dataset=Samples() if dataset is None else dataset,
                eval_dataset=Samples(lambda image, epoch, index: 0 * image),
                callbacks=[callback, *(make() for make in callbacks)],
            )
            trainer.train(resume_from_checkpoint=checkpoints.restore_files({"test": 1}, total_steps=total_steps))
            outcome = {
                "weights": weights_digest(trainer.model.state_dict()),
                "optimizer": [
                    weights_digest(state) for state in trainer.optimizer.state_dict()["state"].values()
                ],
                "history": callback.history,
                "steps": trainer.state.global_step,
            }  # fmt: skip
        return outcome, trainer, checkpoints.resumed_from


@pytest.fixture
def fit(hf: ModuleType, adapter: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    return Fit(hf, adapter, tmp_path, monkeypatch)


def kept(directory: Path) -> dict[int, Path]:
    """The checkpoints in a directory by their step."""
    return {int(path.name.split("-")[1]): path for path in sorted(directory.glob("step-*"))}


# ------------------------------------------------------------ the example


def test_accuracy_and_inference_from_the_saved_directory(digits: ModuleType, tmp_path: Path) -> None:
    """98.61% was measured."""
    with CheckpointManager(tmp_path, save_every=50, keep_best=("eval_loss", "min")) as checkpoints:
        result = digits.train(digits.TrainConfig(), checkpoints)
    data = digits.load_data("digits")
    accuracy, counts = digits.confusion_matrix(str(result.path), data)
    assert accuracy >= 0.96
    assert np.sum(counts) == 360 and np.trace(counts) == round(accuracy * 360)
    best = min((r for r in result.history if "eval_loss" in r), key=lambda record: record["eval_loss"])
    assert accuracy == best["eval_accuracy"], "the saved model is not the best one"
    assert digits.confusion_matrix(str(result.path), data, dtype="bfloat16")[0] >= 0.95
    classifier = digits.AutoModelForImageClassification.from_pretrained(result.path)
    assert weights_digest(classifier.state_dict()) == result.weights_digest
    processor = digits.AutoImageProcessor.from_pretrained(result.path)
    assert (list(processor.image_mean), processor.size["height"]) == ([0.5], 28), (
        "not the image processor of the training"
    )
    assert {record["epoch"] for record in result.history if "epoch" in record} == set(range(1, 13))
    assert not any(key.endswith(("runtime", "per_second")) for record in result.history for key in record)


def test_keys_of_the_model_round_trip(digits: ModuleType, tmp_path: Path) -> None:
    """Guard: this model would survive transformers' own resume, too. ViT would not, see the tests on it."""
    from safetensors import safe_open

    config = digits.TrainConfig(epochs=1, batch_size=720)
    with CheckpointManager(tmp_path) as checkpoints:
        path = digits.train(config, checkpoints).path
        saved = set(safe_open(path / "model.safetensors", "pt").keys())
        assert saved == set(digits.AutoModelForImageClassification.from_pretrained(path).state_dict())


@pytest.mark.parametrize(
    "strategy, steps, model_of", [("best", [2, 8, 9], 9), ("last", [9], 9), ("all", [2, 3, 4, 6, 8, 9], 9)]
)
def test_save_strategies(digits, tmp_path, monkeypatch, strategy, steps, model_of):
    """What is kept after three epochs of three steps, one kill, and a rotation or not."""
    options = load("flow").what_to_keep(strategy, "eval_loss")
    config = digits.TrainConfig(epochs=3, batch_size=500)
    if strategy == "best":  # here the first checkpoint is the best: greater is better, and the loss falls
        options["keep_best"], model_of = ("eval_loss", "max"), 3
        steps = [3, 8, 9]
    monkeypatch.setenv("FAULTS", "raise@step=5")
    for _ in range(2):
        try:
            with CheckpointManager(tmp_path, save_every=2, **options) as checkpoints:
                result = digits.train(config, checkpoints)
        except FaultInjected:
            continue
    assert checkpoints.resumed_from == [4]
    if strategy == "all":
        steps = [2, 4, 6, 8, 9]
    assert list(kept(tmp_path)) == steps
    model = digits.AutoModelForImageClassification.from_pretrained(kept(tmp_path)[model_of])
    assert weights_digest(model.state_dict()) == result.weights_digest


def test_an_unknown_save_strategy_is_refused_by_the_flow(digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "train", digits)
    with pytest.raises(ValueError, match="save-strategy is 'newest' and .*: choose one of best, last, all"):
        load("flow").MnistHuggingFaceFlow.start(SimpleNamespace(save_strategy="newest", metric="eval_loss"))


def test_the_metric_says_what_is_better(hf, tmp_path):
    """As TrainingArguments infers it."""
    for metric in ("eval_loss", "eval_accuracy"):
        inferred = hf.TrainingArguments(
            str(tmp_path), metric_for_best_model=metric, load_best_model_at_end=True, save_strategy="epoch",
            eval_strategy="epoch", use_cpu=True,
        )  # fmt: skip
        mode = "max" if inferred.greater_is_better else "min"
        assert load("flow").what_to_keep("best", metric) == {"keep_best": (metric, mode)}


def test_the_real_data_set_at_a_revision(digits, tmp_path, monkeypatch):
    """--dataset mnist without the download: load_dataset and the Hub are stand-ins, the images are decoded PNGs."""
    datasets = pytest.importorskip("datasets")
    images = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    split = datasets.Dataset.from_dict({"image": list(images), "label": [7, 1, 3]}, features)
    asked = []

    def load_dataset(name: str, revision: str | None) -> Any:
        asked.append((name, revision))
        return datasets.DatasetDict({"train": split, "test": split})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = digits.load_data("mnist", "abc123")
    assert asked == [("ylecun/mnist", "abc123")]
    assert (data.train_images == images).all() and data.train_images.dtype == np.uint8
    assert data.val_labels.tolist() == [7, 1, 3] and data.val_labels.dtype == np.int64

    class Hub:
        def dataset_info(self, name: str, revision: str) -> Any:
            return type("Info", (), {"sha": f"commit of {name} at {revision}"})

    monkeypatch.setattr(digits, "HfApi", Hub)
    assert digits.resolve("mnist", "main") == "commit of ylecun/mnist at main"
    assert digits.resolve("digits", "main") == ""


def test_push_to(digits, tmp_path):
    """The flow, killed and resumed: the Hub has its model, in a private repository, and pushes it once."""
    import huggingface_hub

    from common import hub as hub_module

    home = {"HF_HOME": str(tmp_path)}
    arguments = ["--epochs", "2", "--batch-size", "500", "--save-every", "2", "--push-to", "local/digits"]
    run = run_flow(Example(EXAMPLE), *arguments, faults="kill@step=5", env=home)
    assert "[publish] the model of MnistHuggingFaceFlow/" in run.output
    hub_module.allow_loopback()
    with LoopbackHub(tmp_path / "loopback_hub") as hub:
        client = huggingface_hub.HfApi(endpoint=hub.url)
        assert client.repo_info("local/digits").private
        root = client.snapshot_download("local/digits", cache_dir=tmp_path / "cache")
        commits = len(client.list_repo_commits("local/digits"))
    model = digits.AutoModelForImageClassification.from_pretrained(root)
    assert weights_digest(model.state_dict()) == run.data.weights_digest
    assert digits.AutoImageProcessor.from_pretrained(root).size["height"] == 28
    card = (Path(root) / "README.md").read_text()
    best = min((r for r in run.data.history if "eval_loss" in r), key=lambda record: record["eval_loss"])
    assert f"## Metrics at step {best['step']}\n" in card and f"| {best['eval_accuracy']:.6g} |" in card
    env = {**os.environ, **home}
    line = [sys.executable, "-m", "common", "push", f"MnistHuggingFaceFlow/{run.run_id}", "local/digits"]
    done = subprocess.run(line, cwd=REPO, env=env, capture_output=True, text=True, timeout=900)
    assert "it was there already" in done.stdout, done.stderr
    with LoopbackHub(tmp_path / "loopback_hub") as hub:
        assert len(huggingface_hub.HfApi(endpoint=hub.url).list_repo_commits("local/digits")) == commits


def test_a_hub_that_hangs_changes_nothing(digits, tmp_path, monkeypatch, capsys):
    """Weights and history are the same, and the Trainer is done while the Hub still owes its first answer."""
    config = digits.TrainConfig(epochs=2, batch_size=500)
    with CheckpointManager(tmp_path / "straight", save_every=1) as checkpoints:
        straight = digits.train(config, checkpoints)

    def wait(*_: Any, **__: Any) -> None:
        limit = time.monotonic() + 60
        while not hub.requests and time.monotonic() < limit:
            time.sleep(0.05)

    monkeypatch.setattr(digits.Progress, "on_evaluate", wait)
    with LoopbackHub(tmp_path / "hub") as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        hub.fail("", hang=600, times=None)
        place = tmp_path / "pushed"
        publisher = Publisher("user/digits", place, interval=0.05, timeout=600, patience=0.5)
        with publisher, CheckpointManager(place, save_every=1) as checkpoints:
            result = digits.train(config, checkpoints)
            publisher.model(result.path)
        assert {request.status for request in hub.requests} == {0}, "requests, and no answer"
    assert (result.weights_digest, result.history) == (straight.weights_digest, straight.history)
    assert "The model is not on user/digits (no end after 0.5 s). Push it later: python -m common push " in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("bad", [{"dataset": "cifar"}, {"epochs": 0}, {"batch_size": 0}])
def test_bad_configurations(digits, bad):
    with pytest.raises(ValueError):
        digits.TrainConfig(**bad)


# ------------------------------------------------------------ what is restored, and what happens without it


@pytest.mark.parametrize(
    "changes, steps",
    [
        ({}, [2, 3, 4, 5, 8]),
        ({"gradient_accumulation_steps": 3}, [2, 3]),
        ({"eval_strategy": "steps", "eval_steps": 3, "logging_strategy": "epoch"}, [4, 7]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"}, [5]),
        ({"train_sampling_strategy": "sequential", "dataloader_num_workers": 1}, [7]),
        ({"max_steps": 10}, [10]),
    ],
    ids=["plain", "accumulation", "other moments", "plateau", "workers", "max_steps"],
)
def test_a_vit_continues_exactly(fit, changes, steps):
    """Also what save_pretrained stores under other names; in mid-epoch, on its edge, between two log lines."""
    straight = fit("straight", **changes)[0]
    for step in steps:
        outcome, _, resumed = fit(f"killed at {step}", f"raise@step={step}", **changes)
        assert resumed == [step - 1] and outcome == straight, f"killed at {step}"


def disable(monkeypatch: pytest.MonkeyPatch, hf: ModuleType, adapter: ModuleType, what: str) -> None:
    import accelerate
    import torch

    trainer = adapter.ResumableTrainer
    if what == "weights":  # transformers' own way: load_state_dict(strict=False) and a warning
        monkeypatch.delattr(trainer, "_load_from_checkpoint")
        monkeypatch.delattr(trainer, "_issue_warnings_after_load")
    elif what == "optimizer":
        monkeypatch.setattr(accelerate.optimizer.AcceleratedOptimizer, "load_state_dict", lambda *_: None)
    elif what == "scheduler":
        monkeypatch.setattr(torch.optim.lr_scheduler.LambdaLR, "load_state_dict", lambda *_: None)
    elif what == "random state":
        monkeypatch.setattr(trainer, "_load_rng_state", lambda *_: None)
    elif what == "step":
        original = hf.trainer.skip_first_batches
        monkeypatch.setattr(hf.trainer, "skip_first_batches", lambda loader, count: original(loader, 0))
    elif what == "running loss":
        monkeypatch.setattr(adapter.CheckpointCallback, "_resume", lambda *_: None)
    elif what == "epoch of the data":
        monkeypatch.delattr(adapter.CheckpointCallback, "on_epoch_begin")
    elif what == "evaluation of the epoch":
        monkeypatch.setattr(adapter, "_whole", lambda epoch: False)


@pytest.mark.parametrize(
    "what, step",
    [("weights", 3), ("optimizer", 3), ("scheduler", 3), ("random state", 3), ("step", 3), ("running loss", 3),
     ("epoch of the data", 7), ("evaluation of the epoch", 5)],
)  # fmt: skip
def test_without_it_the_result_differs(fit, hf, adapter, monkeypatch, what, step):
    """The negative controls: each part that is restored is needed."""
    straight = fit("straight")[0]
    if what == "evaluation of the epoch":  # it is lost when the checkpoint is made before it
        disable(monkeypatch, hf, adapter, what)
    outcome, _, resumed = fit("killed", f"raise@step={step}", again=lambda: disable(monkeypatch, hf, adapter, what))
    assert resumed == [step - 1] and outcome != straight


def test_what_is_restored_is_said(fit, capsys):
    fit("killed", "raise@step=6")
    output = capsys.readouterr().out
    assert "resumed at step 5 (epoch 1)" in output
    (line,) = [line for line in output.splitlines() if "restored" in line]
    assert line == (
        "[checkpoints] restored weights (24 tensors), optimizer (AdamW, 24 parameters), scheduler (learning rate "
        "0.006294), random state, step 5"
    )


def test_files_of_a_checkpoint_are_read_without_pickle(fit, hf, monkeypatch):
    """training_args.bin, a pickle, is dropped; the rest is read with weights_only=True."""
    import torch

    original, read = torch.load, {}

    def spy(file: Any, *arguments: Any, **options: Any) -> Any:
        read[Path(file).name] = options.get("weights_only")
        return original(file, *arguments, **options)

    monkeypatch.setattr(torch, "load", spy)
    fit("killed", "raise@step=6")
    assert read == {"optimizer.pt": True, "scheduler.pt": True, "rng_state.pth": True}
    for path in kept(fit.directory / "killed").values():
        assert {file.name for file in path.iterdir()} == {
            "config.json", "manifest.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "running_totals.json",
            "scheduler.pt", "trainer_state.json",
        }  # fmt: skip


def test_the_optimizer_written_later_is_the_one_of_the_step(fit, adapter, monkeypatch):
    """Its file is what the Trainer would have written at once, although the training has gone on meanwhile."""
    import torch

    written, write = [], adapter._write_optimizer

    def late(state, directory):
        time.sleep(0.3)  # some steps
        written.append(directory)
        write(state, directory)

    monkeypatch.setattr(adapter, "_write_optimizer", late)
    every_third = {"save_every": 3, "keep_last": 10}
    ours = fit("ours", manager=every_third)[0]
    assert written, "transformers has changed: it no longer calls _save_optimizer_and_scheduler"
    monkeypatch.delattr(adapter.ResumableTrainer, "_save_optimizer_and_scheduler")
    assert fit("theirs", manager=every_third)[0] == ours
    mine, theirs = kept(fit.directory / "ours"), kept(fit.directory / "theirs")
    assert len(mine) == len(written) > 2 and mine.keys() == theirs.keys()
    for step, path in mine.items():
        for name in ("optimizer.pt", "scheduler.pt"):
            a, b = (torch.load(directory / name, weights_only=True) for directory in (path, theirs[step]))
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------ the best one, the half-written one, the finished one


def evaluated(trainer: Any) -> list[float]:
    return [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]


def test_the_best_survives_rotation_and_restore(fit, hf, tmp_path):
    """The first epoch is the best here (greater is better, and the loss falls); then 8 checkpoints and two restarts."""
    manager = {"keep_last": 1, "keep_best": ("eval_loss", "max")}
    _, trainer, resumed = fit("best", "raise@step=6;raise@step=11", manager=manager)
    assert resumed == [5, 10] and list(kept(tmp_path / "best")) == [4, 12]
    losses = evaluated(trainer)
    assert losses[0] == max(losses) > losses[-1]
    model = hf.ViTForImageClassification.from_pretrained(kept(tmp_path / "best")[4])
    trainer.model.load_state_dict(model.state_dict())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


def test_upstream_loses_the_best(hf, tmp_path):
    """The negative control: Trainer with load_best_model_at_end, restarted where its old directory is gone."""
    options = dict(save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_loss",
                   greater_is_better=True, save_total_limit=1)  # fmt: skip

    class Stop(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 10:
                raise FaultInjected("as if killed")

    def new(place: str, *callbacks: Any) -> Any:
        changed = arguments(hf, tmp_path / place, **options)
        samples = Samples(lambda image, epoch, index: 0 * image)
        return hf.Trainer(
            tiny_resnet(hf), changed, train_dataset=Samples(), eval_dataset=samples, callbacks=[*callbacks]
        )

    with pytest.raises(FaultInjected):
        new("first", Stop()).train()
    shutil.move(tmp_path / "first" / "checkpoint-8", tmp_path / "restored")
    shutil.rmtree(tmp_path / "first")
    trainer = new("second")
    trainer.train(resume_from_checkpoint=str(tmp_path / "restored"))
    assert trainer.state.best_metric == evaluated(trainer)[0], "the first epoch is the best: the loss falls"
    assert trainer.evaluate()["eval_loss"] < trainer.state.best_metric - 1e-3


KILLED_IN_MID_WRITE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from train import *

def kill(trainer, directory):
    if trainer.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    original(trainer, directory)

original, ResumableTrainer._save_rng_state = ResumableTrainer._save_rng_state, kill
with CheckpointManager(sys.argv[2], save_every=2) as checkpoints:
    train(TrainConfig(epochs=2, batch_size=360), checkpoints)
"""


def test_a_half_written_checkpoint_is_never_chosen(digits, hf, tmp_path):
    """SIGKILL while the Trainer writes checkpoint-4: weights and schedule are there, random state and position not."""
    command = [sys.executable, "-c", KILLED_IN_MID_WRITE, str(EXAMPLE), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    (half,) = tmp_path.rglob("checkpoint-4")
    assert (half / "model.safetensors").exists() and (half / "scheduler.pt").exists()
    assert not (half / "trainer_state.json").exists()
    assert hf.trainer_utils.get_last_checkpoint(half.parent) == str(half), "the negative control: upstream takes it"
    with CheckpointManager(tmp_path, save_every=2) as checkpoints:
        digits.train(digits.TrainConfig(epochs=2, batch_size=360), checkpoints)
    assert checkpoints.resumed_from == [2]
    assert not half.exists(), "what a killed process left was not swept"


def test_a_damaged_checkpoint_is_not_chosen(fit, tmp_path):
    straight = fit("straight")[0]

    def damage() -> None:
        with open(kept(tmp_path / "killed")[6] / "optimizer.pt", "r+b") as file:
            file.truncate(1000)

    outcome, _, resumed = fit("killed", "raise@step=7", again=damage)
    assert resumed == [5] and outcome == straight


def test_a_finished_training_does_not_train_again(fit, hf):
    """max_steps in mid-epoch: a plain Trainer would do an eleventh step."""
    straight, trainer, _ = fit("run", max_steps=10)
    assert straight["steps"] == 10
    outcome, again, resumed = fit("run", max_steps=10)
    assert resumed == [10] and outcome["history"] == straight["history"] and outcome["steps"] == 10
    assert weights_digest(again.model.state_dict()) == straight["weights"]
    last = kept(fit.directory / "run")[10]
    upstream = hf.Trainer(tiny_vit(hf), arguments(hf, fit.directory / "up", max_steps=10), train_dataset=Samples(),
                          eval_dataset=Samples())  # fmt: skip
    upstream.train(resume_from_checkpoint=str(last))
    assert upstream.state.global_step == 11, "transformers has been repaired: ResumableTrainer._run_epoch can go"


def test_a_finished_training_can_be_made_longer(fit):
    fit("run", num_train_epochs=2)
    outcome, _, resumed = fit("run", num_train_epochs=3)
    assert resumed == [8] and outcome["steps"] == 12


def test_early_stopping_continues(fit, hf):
    """Patience counts on, and what stopped early stays stopped."""

    def patience() -> Any:
        return hf.EarlyStoppingCallback(early_stopping_patience=2)

    options = dict(callbacks=(patience,), metric_for_best_model="eval_loss", greater_is_better=True, num_train_epochs=9)
    straight, _, _ = fit("straight", **options)
    assert straight["steps"] == 12, "the loss falls from the first epoch on, so two more end it"
    for step in (5, 9, 12):
        outcome, _, resumed = fit(f"killed at {step}", f"raise@step={step}", **options)
        assert resumed == [step - 1] and outcome == straight
    again, _, resumed = fit("straight", **options)
    assert resumed == [12] and again["history"] == straight["history"] and again["weights"] == straight["weights"]


# ------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"save_strategy": "steps"}, "save_strategy is 'steps'.*keep_best in place of load_best_model_at_end"),
        ({"save_only_model": True}, "save_only_model is True.*optimizer, schedule and random state"),
        ({"ignore_data_skip": True}, "ignore_data_skip"),
        ({"eval_on_start": True}, "eval_on_start"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
        ({"restore_callback_states_from_checkpoint": True}, "restore_callback_states"),
        ({"train_sampling_strategy": "group_by_length"}, "comes from a LengthGroupedSampler.*'sequential'"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "comes from a RandomSampler"),
    ],
)
def test_settings_that_cannot_be_exact_are_refused(fit, hf, changes, message):
    if "group_by_length" in changes.values():
        sampler = hf.trainer.LengthGroupedSampler(4, lengths=[1] * 16)
        fit.monkeypatch.setattr(hf.trainer, "LengthGroupedSampler", lambda *_, **__: sampler)  # images have no length
    with pytest.raises(CheckpointError, match=message):
        fit("refused", **changes)
    assert not kept(fit.directory / "refused")


def test_data_that_cannot_be_exact_are_refused(fit, hf):
    import torch

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from (Samples()[index] for index in range(16))

    own = torch.Generator().manual_seed(0)
    for dataset, message in [
        (Samples(by_global_state), "draws from a global random state"),
        (Samples(lambda image, epoch, index: np.random.rand()), "draws from a global random state"),
        (Samples(lambda image, epoch, index: torch.randn(image.shape, generator=own)), "gives two results"),
        (Endless(), "without a length"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            fit("refused", dataset=dataset, max_steps=12)


def test_data_from_a_global_random_state_would_differ(fit, adapter, monkeypatch):
    """The negative control of the refusal: Trainer reads a batch ahead, so its random state is restored too late."""
    monkeypatch.setattr(adapter, "_random_states", lambda: 0)
    monkeypatch.setattr(adapter, "weights_digest", lambda tensors: "")
    straight = fit("straight", dataset=Samples(by_global_state))[0]
    outcome, _, resumed = fit("killed", "raise@step=3", dataset=Samples(by_global_state))
    assert resumed == [2] and outcome != straight


def test_a_plain_trainer_is_refused(fit, hf):
    with pytest.raises(CheckpointError, match=r"class MyTrainer\(ResumableTrainer, SFTTrainer\)"):
        fit("refused", trainer_class=hf.Trainer)


def test_directories_that_are_no_checkpoint_are_refused(hf, adapter, tmp_path):
    with CheckpointManager(tmp_path / "checkpoints") as checkpoints:
        callback = adapter.CheckpointCallback(checkpoints)
        trainer = adapter.ResumableTrainer(tiny_vit(hf), arguments(hf, tmp_path / "out"), train_dataset=Samples(),
                                           eval_dataset=Samples(), callbacks=[callback])  # fmt: skip
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="has no trainer_state.json, running_totals.json, optimizer.pt"):
            trainer.train(resume_from_checkpoint=tmp_path / "empty")
        with pytest.raises(CheckpointError, match="resume_from_checkpoint is True"):
            trainer.train(resume_from_checkpoint=True)
        trainer.add_callback(adapter.CheckpointCallback(checkpoints))
        with pytest.raises(CheckpointError, match="has 2 CheckpointCallbacks: give it one"):
            trainer.train()


def test_another_model_is_refused(fit, hf):
    """Trainer would warn, and train the rest from random weights."""

    def smaller(hf: ModuleType) -> Any:
        model = tiny_vit(hf)
        config = hf.ViTConfig.from_dict({**model.config.to_dict(), "num_labels": 5})
        return hf.ViTForImageClassification(config)

    fit("run", num_train_epochs=1)
    with pytest.raises((CheckpointError, RuntimeError), match="another model|size mismatch|mismatched"):
        fit("run", model=smaller)


def test_weights_of_several_types_are_refused(fit, hf):
    def mixed(hf: ModuleType) -> Any:
        import torch

        model = tiny_vit(hf)
        model.classifier.to(torch.bfloat16)
        return model

    with pytest.raises(CheckpointError, match="several types, torch.bfloat16, torch.float32"):
        fit("refused", model=mixed)


def test_a_trainer_with_metrics_of_its_own_logs_every_step(fit, adapter):
    """SFTTrainer and its relatives average metrics between two log lines."""

    class Collecting(adapter.ResumableTrainer):
        _metrics: dict[str, Any] = {}

    with pytest.raises(CheckpointError, match="Set logging_steps=1"):
        fit("refused", trainer_class=Collecting)
    fit("accepted", trainer_class=Collecting, logging_steps=1, num_train_epochs=1)


def test_the_token_count_of_a_trainer_continues(fit, adapter):
    """As SFTTrainer does it: counted in training_step, shown in the history."""

    class Counting(adapter.ResumableTrainer):
        _total_train_tokens = 0

        def training_step(self, *arguments: Any, **options: Any) -> Any:
            self._total_train_tokens += 7
            return super().training_step(*arguments, **options)

        def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            super().log({**logs, "num_tokens": self._total_train_tokens}, *arguments, **options)

    outcome, _, resumed = fit("killed", "raise@step=6", trainer_class=Counting)
    assert resumed == [5] and outcome["history"][-1]["num_tokens"] == 7 * 12


def test_a_misspelt_metric_is_refused_in_the_first_epoch(fit):
    with pytest.raises(CheckpointError, match=r"keep_best names 'val_loss', but .*\['eval_loss'\]"):
        fit("refused", manager={"keep_best": ("val_loss", "min")})


def test_a_callback_that_ends_an_epoch_is_refused(fit, hf):
    class Shorten(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = True

    with pytest.raises(CheckpointError, match="should_epoch_stop"):
        fit("refused", callbacks=(Shorten,))


def test_the_manifest_has_the_metrics_of_the_evaluation(fit, tmp_path):
    fit("run", manager={"keep_last": 99})
    manifests = {step: Manifest.read(path) for step, path in kept(tmp_path / "run").items()}
    assert {step for step, manifest in manifests.items() if "eval_loss" in manifest.metrics} == {4, 8, 12}
    state = json.loads((kept(tmp_path / "run")[8] / "trainer_state.json").read_text())
    assert state["log_history"][-1]["eval_loss"] == manifests[8].metrics["eval_loss"]
