"""The checkpoint layer for Lightning 2: one callback and one loader for ``trainer.fit``."""

import json
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset

from .checkpoint import CheckpointManager
from .encoding import History
from .errors import CheckpointError
from .sampler import ResumableSampler
from .state import TrainState, rng_state, set_rng_state

pl: Any = import_module("lightning.pytorch")  # it carries no types
CheckpointIO: Any = import_module("lightning.pytorch.plugins.io").CheckpointIO

FILE, KEPT = "trainer.ckpt", "model_checkpoints"  # what a checkpoint consists of
_PLACE = "$directory"  # stands for the manager's directory, which is another one in every process

# what the Trainer may be told, and why nothing else
_SETTINGS = {
    "max_steps": (-1, "it ends an epoch in its middle. Give max_epochs"),
    "val_check_interval": (1.0, "a checkpoint before a validation in mid-epoch would skip it. Validate after epochs"),
    "check_val_every_n_epoch": (1, "metrics of an earlier validation are in no checkpoint. Validate after every epoch"),
    "overfit_batches": (0, "Lightning replaces the sampler. Take a smaller dataset"),
    "limit_train_batches": (1.0, "Lightning counts it anew in an interrupted epoch. Take a smaller dataset"),
    "reload_dataloaders_every_n_epochs": (0, "a new loader has no position. Let one loader serve all epochs"),
    "world_size": (1, "the other processes' random states are in no checkpoint. Take devices=1"),
}


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that shuffles anew in every epoch and can go on in the middle of one.

    Lightning checkpoints any loader that has ``state_dict`` and ``load_state_dict``, and tells its sampler the epoch.
    The order is a function of (seed, epoch). What is random in a sample must be a function of (epoch, index) as well:
    when the dataset has a ``set_epoch``, it is called before each epoch, also in the middle of one after a restart.

    Args:
        dataset: with a length.
        batch_size: samples in a batch.
        seed: of the order.
        options: others of ``DataLoader``; of them, ``shuffle``, ``sampler``, ``batch_sampler`` and
            ``persistent_workers`` are taken.

    Raises:
        CheckpointError: for an option that is taken.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, *, seed: int, **options: Any) -> None:
        taken = {"shuffle", "sampler", "batch_sampler", "persistent_workers"} & set(options)
        if taken:
            raise CheckpointError(f"ResumableLoader shuffles by its seed, and its workers live for an epoch: {taken}")
        self._order = ResumableSampler(len(cast("Any", dataset)), seed)
        self._start = self._done = 0
        cast("Any", super()).__init__(dataset, batch_size, sampler=self._order, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator on purpose: Lightning calls iter() before it tells the epoch, and nothing runs until next()
        start, self._start = self._start, 0
        self._done = start
        self._order.set_epoch(self._order.epoch, start * cast("int", self.batch_size))
        if hasattr(self.dataset, "set_epoch"):
            cast("Any", self.dataset).set_epoch(self._order.epoch)
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._start = state["done"]


class CheckpointCallback(pl.callbacks.Checkpoint):
    """Brings a ``trainer.fit`` back, bit for bit, after any kill, also in the middle of an epoch.

    Lightning makes, writes and reads the checkpoint (``trainer.save_checkpoint``, ``ckpt_path``); the manager decides
    when, has it written in the background from a copy, verifies it, and keeps the newest. The callback adds what
    Lightning leaves out: the random states, the metric history, the files of ModelCheckpoint, and a way around the last
    batch of an epoch, where a checkpoint of Lightning
    would skip the validation or, with some loaders, the next epoch::

        checkpoint = CheckpointCallback(checkpoints)
        ckpt_path = checkpoint.restore(config)
        best = ModelCheckpoint(checkpoints.directory / "best", monitor="val_loss")
        trainer = Trainer(max_epochs=12, callbacks=[best, checkpoint])
        trainer.fit(model, ResumableLoader(data, 64, seed=0), val_loader, ckpt_path=ckpt_path, weights_only=True)

    ModelCheckpoint does what it always does, in a directory that is gone when the process dies. So the files that it
    keeps are part of every checkpoint, and are there again when ``fit`` starts, as is what it knows about them. With
    ``save_weights_only=True`` they take a third of the space. Its ``last`` is not needed: that is what this one saves.

    A checkpoint that falls due in the last step of an epoch, and a stop that is asked for in it, wait for the
    validation that follows. List the callback last. The history has the loss of every ``log_every_n_steps``-th step
    and, for each epoch, what the validation logged.

    Args:
        checkpoints: the manager, in its ``with`` block.

    Raises:
        CheckpointError: for what cannot be made exact: a loader other than :class:`ResumableLoader`, manual
            optimization, ReduceLROnPlateau, validation elsewhere than after an epoch, a monitor that is no metric of
            it, several devices.
        StopRequested: out of ``fit``, when the training was asked to stop; the step is saved.
    """

    def __init__(self, checkpoints: CheckpointManager) -> None:
        pl.callbacks.Checkpoint.__init__(self)
        self._checkpoints = checkpoints
        self._directory = os.path.realpath(checkpoints.directory)
        self._state = TrainState()
        self._ckpt_path: Path | None = None
        self._restored = False
        self._random: dict[str, Any] | None = None  # to be put back where the training goes on
        self._batches: int | None = None  # in an epoch, when the checkpoint was made
        self._ended = False  # by EarlyStopping or its like
        self._saved: tuple[int, int] | None = None
        self._handler: Any = None
        self._at_edge = False
        self._of_training: set[str] = set()  # names of metrics
        self._of_validation: dict[str, float] = {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record for each logged step and each epoch of the whole training."""
        return list(self._state.history)

    def restore(self, config: Any = None, *, total_steps: int | None = None) -> Path | None:
        """Find the newest valid checkpoint and say in one line what was found.

        Args:
            config: what the result depends on, as for :meth:`CheckpointManager.restore`.
            total_steps: optimizer steps of the whole training, for messages.

        Returns:
            What ``trainer.fit`` takes as ``ckpt_path``: a private copy, or None when there is nothing to restore. Load
            it with ``weights_only=True``: it is a file of Lightning, and nothing in it needs pickle.
        """
        directory = self._checkpoints.restore_files(config, total_steps=total_steps)
        self._restored = True
        self._checkpoints.draw(lambda: self._state.history)
        if directory is None:
            return None
        self._ckpt_path = directory / FILE
        if not self._ckpt_path.exists():
            raise CheckpointError(f"the checkpoint has no {FILE}: it was not made by common.lightning")
        return self._ckpt_path

    # ------------------------------------------------------------ content of a checkpoint

    def state_dict(self) -> dict[str, Any]:
        random = rng_state()
        kind, keys, *rest = random["numpy"]
        random["numpy"] = (kind, torch.tensor(keys), *rest)  # weights_only knows tensors, not arrays
        state = self._state
        return {
            "step": state.step,
            "epoch": state.epoch,
            "step_in_epoch": state.step_in_epoch,
            "history": json.dumps(state.history),  # one string: quick to write, also when it is long
            "random": random,
            "batches": self._batches,
            "ended": self._ended,
        }

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._rebase(trainer, checkpoint, self._directory, _PLACE)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._rebase(trainer, checkpoint, _PLACE, self._directory)
        if trainer.state.fn != "fit" or self._ckpt_path is None:  # trainer.test(ckpt_path="best") comes here, too
            return
        kept = self._ckpt_path.with_name(KEPT)
        if kept.exists():
            shutil.copytree(kept, self._directory, dirs_exist_ok=True)
        saved = checkpoint["callbacks"][self.state_key]
        state = self._state
        state.step, state.epoch, state.step_in_epoch = saved["step"], saved["epoch"], saved["step_in_epoch"]
        state.history = History(json.loads(saved["history"]))
        self._batches, self._ended = saved["batches"], saved["ended"]
        self._saved = (state.step, state.epoch)
        kind, keys, *rest = saved["random"]["numpy"]
        self._random = {**saved["random"], "numpy": (kind, keys.numpy(), *rest)}

    def _rebase(self, trainer: Any, checkpoint: dict[str, Any], old: str, new: str) -> None:
        # the paths in ModelCheckpoint's state; what lies elsewhere than it says, it forgets with a warning
        def move(value: Any) -> Any:
            return new + value.removeprefix(old) if isinstance(value, str) and value.startswith(old) else value

        states = checkpoint.get("callbacks", {})
        for callback in _model_checkpoints(trainer):
            if callback.state_key in states:
                state = {key: move(value) for key, value in states[callback.state_key].items()}
                state["best_k_models"] = {move(path): score for path, score in state["best_k_models"].items()}
                states[callback.state_key] = state

    def _save(self, trainer: Any) -> None:
        state = self._state
        if self._saved == (state.step, state.epoch):
            return
        with tempfile.TemporaryDirectory(dir=self._directory) as name:
            directory = Path(name)
            for callback in _model_checkpoints(trainer):
                paths = {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
                for path in filter(None, paths):
                    link = directory / KEPT / os.path.relpath(path, self._directory)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(os.path.realpath(path))
            metrics = self._of_validation if state.step_in_epoch == 0 else {}
            content, io = _checkpoint_of(trainer)
            self._checkpoints.save_files(
                directory, step=state.step, epoch=state.epoch, metrics=metrics,
                tree=content, write=lambda content, directory: io.save_checkpoint(content, directory / FILE),
            )  # fmt: skip
        self._saved = (state.step, state.epoch)

    # ------------------------------------------------------------ called by fit, in this order

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._check_settings(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._restored or trainer.ckpt_path != self._ckpt_path:
            raise CheckpointError(
                f"fit was given ckpt_path={trainer.ckpt_path}: call CheckpointCallback.restore() and give fit what it "
                f"returns{f' ({self._ckpt_path})' if self._restored else ''}"
            )
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau:
                raise CheckpointError(
                    "ReduceLROnPlateau cannot be continued exactly: Lightning updates it after the checkpoint of an "
                    "epoch and skips that update when it restarts. Take another schedule."
                )
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, ResumableLoader):
            raise CheckpointError(
                f"the training data come from a {type(loader).__name__}, which cannot go on in the middle of an epoch. "
                "Take common.lightning.ResumableLoader(dataset, batch_size, seed=...)"
            )
        batches = trainer.num_training_batches
        if self._state.step_in_epoch and self._batches != batches:
            raise CheckpointError(
                f"the checkpoint stands at step {self._state.step_in_epoch} of an epoch with {self._batches} batches, "
                f"which now has {batches}: continue with the old dataset and batch size, or from the end of an epoch"
            )
        self._batches = batches
        trainer.should_stop = self._ended
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            # Lightning has put its own handler before the manager's: it would end fit before the step is saved
            signal.signal(signal.SIGTERM, self._handler)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._restore_random()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._restore_random()

    def _restore_random(self) -> None:
        # as late as possible, so that nothing at the beginning of fit draws from them
        if self._random is not None:
            set_rng_state(self._random)
            self._random = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        state = self._state
        if trainer.global_step == state.step:
            return  # gradients are being accumulated
        state.step = trainer.global_step
        state.step_in_epoch += 1
        if state.step % trainer.log_every_n_steps == 0:
            state.log({"loss": outputs["loss"].item()})
        self._at_edge = trainer.is_last_batch
        if not self._at_edge:
            self._checkpoints.boundary(state.step, lambda: self._save(trainer))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._of_training = set(trainer.callback_metrics) - set(self._of_validation)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self._of_validation = {name: value.item() for name, value in metrics if name not in self._of_training}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        state, metrics = self._state, self._of_validation
        for callback in trainer.callbacks:
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in metrics:
                raise CheckpointError(
                    f"{type(callback).__name__} monitors {monitor!r}, which the validation does not log. A mean over "
                    f"the steps of an epoch begins anew when it is interrupted. Monitor one of {sorted(metrics)}"
                )
        expected = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if state.step_in_epoch != expected and not trainer.should_stop:
            raise CheckpointError(
                f"epoch {state.epoch + 1} ended after {state.step_in_epoch} of {expected} steps: the loader lost its "
                "position. Go on from an earlier checkpoint with resume_from, and report it"
            )
        state.epoch += 1
        state.step_in_epoch = 0
        self._ended = trainer.should_stop
        state.log(metrics, epoch=state.epoch)
        if self._at_edge:  # the boundary of the epoch's last step, held back until the validation was over
            self._checkpoints.boundary(state.step, lambda: self._save(trainer))
        last = trainer.should_stop or state.epoch == trainer.max_epochs
        self._checkpoints.epoch_boundary(metrics, lambda: self._save(trainer), last=last)

    def _check_settings(self, trainer: Any, pl_module: Any) -> None:
        for name, (value, why) in _SETTINGS.items():
            if getattr(trainer, name) != value:
                raise CheckpointError(f"{name} is {getattr(trainer, name)}, which cannot be continued exactly: {why}.")
        if not pl_module.automatic_optimization:
            raise CheckpointError(
                "the module optimizes manually: a checkpoint could fall between its optimizers. Use automatic "
                "optimization"
            )
        if trainer.callbacks[-1] is not self:
            raise CheckpointError(
                f"{type(trainer.callbacks[-1]).__name__} comes after CheckpointCallback, so what it does in a step "
                "would be missing from the checkpoint: list CheckpointCallback last"
            )
        for callback in _model_checkpoints(trainer):
            if not Path(callback.dirpath).is_relative_to(self._directory):
                raise CheckpointError(
                    f"ModelCheckpoint writes to {callback.dirpath}, where files of an attempt that was killed would "
                    "stay: give it a directory in checkpoints.directory, whose files are part of every checkpoint"
                )


class _Collector(CheckpointIO):
    """Takes what Lightning would write."""

    content: Any = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.content = checkpoint

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        raise NotImplementedError

    def remove_checkpoint(self, path: Any) -> None:
        raise NotImplementedError


def _checkpoint_of(trainer: Any) -> tuple[dict[str, Any], Any]:
    """What ``trainer.save_checkpoint`` would write, all of the state, and the plugin that would write it."""
    strategy, collector = trainer.strategy, _Collector()
    io, strategy.checkpoint_io = strategy.checkpoint_io, collector
    try:
        trainer.save_checkpoint(FILE, weights_only=False)
    finally:
        strategy.checkpoint_io = io
    return collector.content, io


def _model_checkpoints(trainer: Any) -> list[Any]:
    return [callback for callback in trainer.callbacks if isinstance(callback, pl.callbacks.ModelCheckpoint)]
