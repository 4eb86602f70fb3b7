"""What is special about mnist_ptl/ and common.lightning: what Lightning would forget, and what is refused."""

import importlib.util
import json
import logging
import os
import pickle
import random
import signal
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import gallery
import numpy as np
import pytest

from common import (
    CheckpointError,
    CheckpointManager,
    FaultInjected,
    StopRequested,
    seed_everything,
    weights_digest,
)

pytestmark = [pytest.mark.xdist_group("mnist_ptl"), pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")]

STEPS, EPOCHS = 4, 4


@pytest.fixture(scope="module")
def pl() -> ModuleType:
    """Imported late: it takes seconds, and every worker collects this file."""
    module = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return module


@pytest.fixture(scope="module")
def digits(pl: ModuleType) -> ModuleType:
    """mnist_ptl/train.py, by a name that no other example's has."""
    spec = importlib.util.spec_from_file_location("mnist_ptl_train", gallery.REPO / "mnist_ptl" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------ a small model, four epochs of four steps


def new_module(pl: ModuleType, **overridden: Any) -> Any:
    """Draws random numbers wherever a user's module might; ``overridden``: methods and attributes."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Small(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
            )  # fmt: skip

        def on_train_epoch_start(self) -> None:
            torch.rand(1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self.net(batch[0]), batch[1]) * random.uniform(0.9, 1.1)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            noise = 0.01 * (torch.rand(()).item() + np.random.rand() + random.random())
            logits = self.net(batch[0])
            accuracy = (logits.argmax(1) == batch[1]).float().mean()
            self.log_dict({"val_loss": F.cross_entropy(logits, batch[1]) + noise, "val_acc": accuracy})

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 0.05)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]

    return type("Module", (Small,), overridden)()


def samples() -> Any:
    import torch
    from torch.utils.data import TensorDataset

    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(STEPS * 8, 6)).astype("float32"), generator.integers(3, size=STEPS * 8)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))


class Noisy:
    """Samples with noise that is a function of (epoch, index)."""

    epoch = 0

    def __init__(self) -> None:
        self.samples = samples()

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        x, y = self.samples[index]
        return x + self.epoch * 0.1 + index * 0.01, y


def attempt(
    pl: ModuleType, directory: Path, *, callbacks: Any = None, loader: Any = None, module: Any = None,
    adapter: Any = None, save_every: Any = 3, keep_best: Any = None, batch_size: int = 8,
    ckpt_path: Any = "restored", after: Any = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One attempt of a training, with a new trainer; what it ended with."""
    from torch.utils.data import DataLoader

    from common.lightning import CheckpointCallback, ResumableLoader

    seed_everything(0)
    with CheckpointManager(directory, save_every=save_every, keep_best=keep_best) as checkpoints:
        checkpoint = (adapter or CheckpointCallback)(checkpoints)
        if ckpt_path == "restored":
            ckpt_path = checkpoint.restore({"model": "small"})
        others = callbacks(checkpoints) if callbacks else []
        options = {
            "max_epochs": EPOCHS, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1, "callbacks": [*others, checkpoint], **options,
        }  # fmt: skip
        trainer = pl.Trainer(**options)
        module = module() if module else new_module(pl)
        data = (loader or ResumableLoader)(Noisy(), batch_size, **({} if loader else {"seed": 1}))
        trainer.fit(module, data, DataLoader(samples(), 16), ckpt_path=ckpt_path, weights_only=True)
        if after:
            after(trainer, module)
        kept = [
            {"best": callback.best_model_path, "score": float(callback.best_model_score or 0),
             "files": sorted(path.name for path in Path(callback.dirpath).glob("*"))}
            for callback in others if isinstance(callback, pl.callbacks.ModelCheckpoint)
        ]  # fmt: skip
        for entry in kept:
            entry["best"] = Path(entry["best"]).relative_to(checkpoints.directory).as_posix()
    return {
        "weights": weights_digest(module.state_dict()),
        "history": checkpoint.history,
        "resumed_from": checkpoints.resumed_from,
        "global_step": trainer.global_step,
        "kept": kept,
    }


def interrupted(pl: ModuleType, monkeypatch: Any, directory: Path, fault: str, **options: Any) -> dict[str, Any]:
    """Ended by a fault, then started again with a new module and trainer."""
    monkeypatch.setenv("FAULTS", fault)
    with pytest.raises((FaultInjected, StopRequested)):
        attempt(pl, directory, **options)
    return attempt(pl, directory, **options)


def assert_same(again: dict[str, Any], straight: dict[str, Any], resumed_from: int) -> None:
    assert again["resumed_from"] == [resumed_from]
    assert {**again, "resumed_from": []} == straight


@pytest.fixture(scope="module")
def straight(pl: ModuleType, tmp_path_factory: Any) -> dict[str, Any]:
    return attempt(pl, tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("step", [2, 4, 5, 8, 11, 16])
def test_ends_the_same(pl: Any, straight: Any, monkeypatch: Any, tmp_path: Path, step: int) -> None:
    """Asked to stop in an epoch, in its last step (4, 8), and in the very last (16)."""
    assert straight["global_step"] == STEPS * EPOCHS
    assert_same(interrupted(pl, monkeypatch, tmp_path, f"term@step={step}"), straight, step)


def test_history(straight: Any) -> None:
    steps = [record for record in straight["history"] if "epoch" not in record]
    epochs = [record for record in straight["history"] if "epoch" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS * EPOCHS + 1))
    assert all(set(record) == {"step", "loss"} for record in steps)
    assert [record["epoch"] for record in epochs] == [1, 2, 3, 4]
    assert all(set(record) == {"step", "epoch", "val_loss", "val_acc"} for record in epochs)


def test_sanity_checking_changes_nothing(pl: Any, straight: Any, tmp_path: Path) -> None:
    """It validates before the training, and this module's validation draws random numbers."""
    assert attempt(pl, tmp_path, num_sanity_val_steps=0) == straight


@pytest.mark.parametrize(("accumulate", "step"), [(2, 3), (3, 5)])
def test_accumulated_gradients(pl: Any, monkeypatch: Any, tmp_path: Path, accumulate: int, step: int) -> None:
    """With 3 the last step of an epoch has one batch; step 3 and 5 are the first of an epoch."""
    options = {"accumulate_grad_batches": accumulate}
    straight = attempt(pl, tmp_path / "straight", **options)
    assert straight["global_step"] == 2 * EPOCHS
    assert_same(interrupted(pl, monkeypatch, tmp_path / "again", f"term@step={step}", **options), straight, step)


def test_worker_processes(pl: Any, straight: Any, monkeypatch: Any, tmp_path: Path) -> None:
    from common.lightning import ResumableLoader

    def loader(dataset: Any, batch_size: int) -> Any:
        return ResumableLoader(dataset, batch_size, seed=1, num_workers=2)

    assert_same(interrupted(pl, monkeypatch, tmp_path, "term@step=6", loader=loader), straight, 6)


def test_loader(pl: Any) -> None:
    """What Lightning does: iter() first, then set_epoch; it may leave an epoch without asking for its end."""
    from common.lightning import ResumableLoader

    def labels(loader: Any, epoch: int, count: int) -> list[int]:
        batches = iter(loader)
        loader.sampler.set_epoch(epoch)
        taken = [next(batches)[0].tolist() for _ in range(count)]
        assert loader.dataset.epoch == epoch and loader.state_dict()["done"] <= STEPS
        return taken

    loader, other = (ResumableLoader(Noisy(), 8, seed=1) for _ in range(2))
    first, second = labels(loader, 0, 4), labels(loader, 1, 4)
    assert first != second and labels(loader, 0, 2) == first[:2]
    other.load_state_dict(loader.state_dict())
    assert labels(other, 0, 2) == first[2:], "it goes on in the middle"
    assert labels(other, 1, 4) == second, "and begins the next epoch at its beginning"


# ------------------------------------------------------------ the edge of an epoch


def hasty(pl: ModuleType) -> Any:
    """Negative control: saves after the last batch of an epoch, as ModelCheckpoint(every_n_train_steps=...) does."""
    from common.lightning import CheckpointCallback

    class Hasty(CheckpointCallback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, *arguments)
            if self._at_edge:
                self._checkpoints.boundary(self._state.step, lambda: self._save(trainer))

    return Hasty


def test_lightning_itself_loses_an_epoch(pl: Any, straight: Any, monkeypatch: Any, tmp_path: Path) -> None:
    again = interrupted(pl, monkeypatch, tmp_path, "term@step=4", adapter=hasty(pl))
    assert again["resumed_from"] == [4]
    assert again["global_step"] == STEPS * (EPOCHS - 1), "an epoch was not trained"
    (first,) = [record for record in again["history"] if record.get("epoch") == 1]
    assert "val_loss" not in first, "its predecessor was not validated"


def test_a_lost_position_is_noticed(pl: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """What torchdata's StatefulDataLoader does on the edge of an epoch: the next one is empty, and nobody says so."""
    from common.lightning import ResumableLoader

    class Empty(ResumableLoader):
        def load_state_dict(self, state: Any) -> None:
            self._start = len(self)

    def loader(dataset: Any, batch_size: int) -> Any:
        return Empty(dataset, batch_size, seed=1)

    with pytest.raises(CheckpointError, match="epoch 2 ended after 2 of 4 steps: the loader lost its position"):
        interrupted(pl, monkeypatch, tmp_path, "term@step=6", loader=loader)


def test_saved_at_the_end_of_epochs_only(pl: Any, straight: Any, monkeypatch: Any, tmp_path: Path) -> None:
    assert_same(interrupted(pl, monkeypatch, tmp_path, "raise@step=11", save_every=None), straight, 8)


def test_no_step_is_saved_twice(pl: Any, tmp_path: Path) -> None:
    """On the edge of an epoch it is due as a step and as the last one."""
    attempt(pl, tmp_path, save_every=1, keep_best=("val_loss", "min"))
    saved = [event["step"] for event in events(tmp_path) if event["event"] == "saved"]
    assert saved == list(range(1, STEPS * EPOCHS + 1))


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for log in directory.glob("events/*") for line in log.read_text().splitlines()]


def test_keep_best_of_the_manager(pl: Any, tmp_path: Path) -> None:
    result = attempt(pl, tmp_path, save_every=100, keep_best=("val_loss", "min"))
    best = min((record for record in result["history"] if "epoch" in record), key=lambda record: record["val_loss"])
    assert (tmp_path / f"step-{best['step']:08}").is_dir()
    with pytest.raises(CheckpointError, match=r"keep_best names 'nonsense', but .* \['val_acc', 'val_loss'\]"):
        attempt(pl, tmp_path / "other", keep_best=("nonsense", "min"))


# ------------------------------------------------------------ random states


def test_without_the_random_states_it_differs(pl: Any, straight: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Negative control."""
    monkeypatch.setattr("common.lightning.set_rng_state", lambda states: None)
    again = interrupted(pl, monkeypatch, tmp_path, "term@step=6")
    assert again["resumed_from"] == [6] and again["weights"] != straight["weights"]


def test_without_the_position_it_differs(pl: Any, straight: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Negative control."""
    monkeypatch.setattr("common.lightning.ResumableLoader.load_state_dict", lambda self, state: None)
    again = interrupted(pl, monkeypatch, tmp_path, "term@step=6")
    assert again["resumed_from"] == [6] and again["weights"] != straight["weights"]


# ------------------------------------------------------------ Lightning's own callbacks


def model_checkpoints(pl: ModuleType) -> Any:
    def make(checkpoints: CheckpointManager) -> list[Any]:
        kind, directory = pl.callbacks.ModelCheckpoint, checkpoints.directory
        return [
            kind(directory / "loss", monitor="val_loss", save_top_k=2, save_last="link"),
            kind(directory / "acc", "{epoch}-{val_acc:.2f}", "val_acc", mode="max", save_weights_only=True),
        ]

    return make


@pytest.mark.parametrize("step", [6, 8, 15])
def test_model_checkpoint_continues(pl: Any, monkeypatch: Any, tmp_path: Path, step: int) -> None:
    """Its directory is gone with the process; its files, scores and paths are there again."""
    straight = attempt(pl, tmp_path / "straight", callbacks=model_checkpoints(pl))
    assert len(straight["kept"][0]["files"]) == 3 and straight["kept"][1]["score"] > 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dirpath has changed")
        again = interrupted(
            pl, monkeypatch, tmp_path / "again", f"term@step={step}", callbacks=model_checkpoints(pl)
        )  # fmt: skip
    assert_same(again, straight, step)


def test_validating_the_best_changes_nothing(pl: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Lightning gives the callbacks what is in that checkpoint, an earlier history among it."""
    from torch.utils.data import DataLoader

    def validate(trainer: Any, module: Any) -> None:
        path = trainer.callbacks[0].best_model_path
        trainer.validate(module, DataLoader(samples(), 16), ckpt_path=path, weights_only=True, verbose=False)

    options = {"callbacks": model_checkpoints(pl)}
    straight = attempt(pl, tmp_path / "straight", **options)
    again = interrupted(pl, monkeypatch, tmp_path / "again", "term@step=6", after=validate, **options)
    assert again["history"] == straight["history"]
    assert again["kept"][0]["best"] == straight["kept"][0]["best"]


def test_early_stopping_continues(pl: Any, monkeypatch: Any, tmp_path: Path) -> None:
    def patience(checkpoints: CheckpointManager) -> list[Any]:
        return [pl.callbacks.EarlyStopping("val_loss", min_delta=9.0, patience=2)]

    options = {"callbacks": patience, "max_epochs": 6}
    straight = attempt(pl, tmp_path / "straight", **options)
    assert straight["global_step"] == 3 * STEPS, "EarlyStopping did not end the training"
    assert_same(interrupted(pl, monkeypatch, tmp_path / "again", "term@step=9", **options), straight, 9)
    ended = attempt(pl, tmp_path / "again", **options)
    assert ended["history"] == straight["history"], "a training that was stopped early went on"


# ------------------------------------------------------------ stopping


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_end", "validation_step"])
def test_signals(pl: Any, straight: Any, tmp_path: Path, name: str, hook: str) -> None:
    """At any moment, the step in hand is saved, and fit ends with StopRequested instead of one of its own exits."""
    pending = [getattr(signal, name)]

    def module() -> Any:
        small = new_module(pl)
        original = getattr(small, hook)

        def signalled(*arguments: Any) -> Any:
            if small.trainer.global_step == 4 and pending:
                os.kill(os.getpid(), pending.pop())
            return original(*arguments)

        setattr(small, hook, signalled)
        return small

    with pytest.raises(StopRequested, match=name):
        attempt(pl, tmp_path, module=module)
    assert_same(attempt(pl, tmp_path), straight, 5 if hook == "training_step" else 4)


def test_lightnings_own_handler_would_not_save(pl: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """Negative control: with Lightning's SIGTERM handler in place, fit ends between two boundaries."""
    from common.lightning import CheckpointCallback

    class Polite(CheckpointCallback):
        def on_fit_start(self, *arguments: Any) -> None:
            super().on_fit_start(*arguments)
            self._handler = None

    def on_train_batch_end(self: Any, *arguments: Any) -> None:
        if self.trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        attempt(pl, tmp_path, adapter=Polite, module=lambda: new_module(pl, on_train_batch_end=on_train_batch_end))
    assert not (tmp_path / "step-00000005").exists()


# ------------------------------------------------------------ files


def test_nothing_is_unpickled(pl: Any, tmp_path: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    attempt(pl, tmp_path, max_epochs=1)
    (path,) = tmp_path.glob("*-00000004/trainer.ckpt")
    content = torch.load(path, weights_only=True)
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.restore_files({"model": "small"})
        (tmp_path / "evil").mkdir()
        torch.save({**content, "hyper_parameters": Evil()}, tmp_path / "evil" / "trainer.ckpt")
        checkpoints.save_files(tmp_path / "evil", step=5)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        attempt(pl, tmp_path)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 6}, "max_steps is 6"),
        ({"val_check_interval": 0.5}, "val_check_interval is 0.5"),
        ({"check_val_every_n_epoch": 2}, "check_val_every_n_epoch is 2"),
        ({"limit_train_batches": 2}, "limit_train_batches is 2"),
        ({"overfit_batches": 2}, "overfit_batches is 2"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs is 1"),
        ({"ckpt_path": None}, r"call CheckpointCallback.restore\(\)"),
    ],
)
def test_refuses_settings(pl: Any, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        attempt(pl, tmp_path, **options)


def test_refuses_several_devices(pl: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(CheckpointError, match="world_size is 2"):
        attempt(pl, tmp_path)


def test_refuses_loaders(pl: Any, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    from common.lightning import ResumableLoader

    def shuffled(dataset: Any, batch_size: int) -> Any:
        return DataLoader(dataset, batch_size, shuffle=True)

    with pytest.raises(CheckpointError, match=r"from a DataLoader, which cannot go on.*ResumableLoader\(dataset"):
        attempt(pl, tmp_path, loader=shuffled)
    with pytest.raises(CheckpointError, match="shuffles by its seed.*persistent_workers"):
        ResumableLoader(samples(), 8, seed=1, num_workers=1, persistent_workers=True)


def test_refuses_modules(pl: Any, tmp_path: Path) -> None:
    import torch

    def plateau(self: Any) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    with pytest.raises(CheckpointError, match="ReduceLROnPlateau cannot be continued"):
        attempt(pl, tmp_path, module=lambda: new_module(pl, configure_optimizers=plateau))
    with pytest.raises(CheckpointError, match="the module optimizes manually"):
        attempt(pl, tmp_path, module=lambda: new_module(pl, automatic_optimization=False))


def test_refuses_callbacks(pl: Any, tmp_path: Path) -> None:
    from common.lightning import CheckpointCallback

    class Last(pl.callbacks.Checkpoint):
        pass

    for number, (callback, message) in enumerate(
        [
            (
                pl.callbacks.ModelCheckpoint(tmp_path / "x"),
                "writes to .*: give it a directory in checkpoints.directory",
            ),
            (pl.callbacks.EarlyStopping("train_loss_epoch"), "monitors 'train_loss_epoch', which the validation does"),
        ]
    ):
        with pytest.raises(CheckpointError, match=message):
            attempt(pl, tmp_path / str(number), callbacks=lambda checkpoints, callback=callback: [callback])
    with CheckpointManager(tmp_path / "last") as checkpoints:
        trainer = pl.Trainer(max_epochs=1, callbacks=[CheckpointCallback(checkpoints), Last()], logger=False)
        with pytest.raises(CheckpointError, match="Last comes after CheckpointCallback"):
            trainer.fit(new_module(pl), samples(), samples())


def test_refuses_checkpoints_of_something_else(pl: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("FAULTS", "raise@step=7")
    with pytest.raises(FaultInjected):
        attempt(pl, tmp_path / "a")
    with pytest.raises(CheckpointError, match="step 2 of an epoch with 4 batches, which now has 2"):
        attempt(pl, tmp_path / "a", batch_size=16)
    with CheckpointManager(tmp_path / "b") as checkpoints:
        (tmp_path / "other.txt").write_text("something else")
        checkpoints.restore_files({"model": "small"})
        (tmp_path / "files").mkdir()
        (tmp_path / "other.txt").rename(tmp_path / "files" / "other.txt")
        checkpoints.save_files(tmp_path / "files", step=1)
    with pytest.raises(CheckpointError, match=r"no trainer\.ckpt"):
        attempt(pl, tmp_path / "b")


# ------------------------------------------------------------ the example


def test_accuracy_and_model_file(digits: ModuleType, tmp_path: Path) -> None:
    """98% is what the README states; the saved model is what the next step loads."""
    import torch

    with CheckpointManager(tmp_path) as checkpoints:
        result = digits.train(digits.TrainConfig(), checkpoints)
        accuracy, counts = digits.confusion_matrix(str(result.path), "digits")
        latest = Path(checkpoints.latest)
        content = torch.load(latest / "trainer.ckpt", weights_only=True)
    assert accuracy >= 0.96
    assert accuracy == pytest.approx(max(record.get("val_acc", 0) for record in result.history))
    assert np.sum(counts) == len(digits.load_data("digits").val_labels)
    assert content["global_step"] == result.history[-1]["step"] == 12 * 23
    assert str(tmp_path) not in str(content["callbacks"]), "the checkpoint has paths of this process in it"
    assert len(list((latest / "model_checkpoints" / "best").iterdir())) == 3
    assert [path.name for path in result.path.iterdir()] == ["model.safetensors"]


def test_early_stopping_needs_nothing(pl: Any, digits: ModuleType, monkeypatch: Any, tmp_path: Path) -> None:
    """A user's EarlyStopping in train.py: it ends well, and so does a start after the end."""

    def trainer(*, callbacks: list[Any], **options: Any) -> Any:
        patience = pl.callbacks.EarlyStopping("val_loss", min_delta=9.0, patience=1)
        return pl.Trainer(callbacks=[patience, *callbacks], **options)

    monkeypatch.setattr(digits, "Trainer", trainer)
    config = digits.TrainConfig(epochs=4, batch_size=360)
    for _ in range(2):
        with CheckpointManager(tmp_path) as checkpoints:
            result = digits.train(config, checkpoints)
        assert result.history[-1]["epoch"] == 2 < config.epochs


def test_mnist(digits: ModuleType, monkeypatch: Any, tmp_path: Path) -> None:
    """torchvision's MNIST is used as it is, with 100 images in the place of the download."""
    import torch
    import torchvision

    class Few:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            data = digits.load_data("digits")
            self.data, self.targets = torch.tensor(data.val_images[:100]), torch.tensor(data.val_labels[:100])

    monkeypatch.setattr(torchvision.datasets, "MNIST", Few)
    with CheckpointManager(tmp_path) as checkpoints:
        result = digits.train(digits.TrainConfig(dataset="mnist", epochs=1), checkpoints)
    assert result.history[-1]["step"] == 2


@pytest.mark.parametrize(("field", "value"), [("dataset", "imagenet"), ("epochs", 0), ("batch_size", -1)])
def test_bad_configuration(digits: ModuleType, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=str(value)):
        digits.TrainConfig(**{field: value})
