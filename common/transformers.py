"""The checkpoint layer for the Trainer of Hugging Face transformers and its subclasses: one callback, one class.

The Trainer writes and reads its own ``checkpoint-N``; the manager decides when, verifies it, and keeps it. Private
parts of ``Trainer`` in use, each with a test that fails when it changes: ``_load_from_checkpoint``,
``_issue_warnings_after_load``, ``_run_epoch``, ``_save_optimizer_and_scheduler``, ``_tr_loss`` and
``_globalstep_last_logged``; of TRL's ``SFTTrainer``: ``_metrics`` and ``_total_train_tokens``.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, SequentialSampler

from .checkpoint import CheckpointManager
from .errors import CheckpointError
from .state import weights_digest, without_clock

transformers: Any = import_module("transformers")  # its types are incomplete
_ExportableState: Any = import_module("transformers.trainer_callback").ExportableState

_STATE, _TOTALS = "trainer_state.json", "running_totals.json"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"
_NEEDED = (_STATE, _TOTALS, _OPTIMIZER, _SCHEDULER, "rng_state.pth")
_TOKENS = "_total_train_tokens"  # SFTTrainer counts them for its history

# what TrainingArguments may say, and why nothing else
_SETTINGS = {
    "save_strategy": ("no", "CheckpointManager decides when to save and what to keep: give it save_every, and "
                            "keep_best in place of load_best_model_at_end"),
    "save_only_model": (False, "optimizer, schedule and random state would be lost"),
    "ignore_data_skip": (False, "an interrupted epoch would start again with its first batches"),
    "eval_on_start": (False, "every restart would evaluate again. Call trainer.evaluate() before trainer.train()"),
    "auto_find_batch_size": (False, "it starts anew with smaller batches. Find the size first, then set it"),
    "enable_jit_checkpoint": (False, "it takes SIGTERM away from CheckpointManager, which saves then, too"),
    "restore_callback_states_from_checkpoint": (False, "it replaces the callbacks by new ones. CheckpointCallback "
                                                       "restores the state of those that you gave"),
    "world_size": (1, "the other processes' random states are in no checkpoint of the manager. Start one process"),
}  # fmt: skip


class CheckpointCallback(transformers.TrainerCallback):
    """Brings a ``trainer.train`` back, bit for bit, after any kill, also in the middle of an epoch.

    Give it to a :class:`ResumableTrainer`, and to its ``train`` the directory that the manager found::

        checkpoint = CheckpointCallback(checkpoints)
        trainer = ResumableTrainer(model, TrainingArguments(..., save_strategy="no"), callbacks=[checkpoint], ...)
        trainer.train(resume_from_checkpoint=checkpoints.restore_files(config, total_steps=...))

    It sets ``control.should_save`` when a checkpoint is due, hands ``checkpoint-N`` to the manager without
    ``training_args.bin`` (a pickle), and removes it: what is kept is the manager's. It adds what the Trainer leaves
    out: the running mean of the loss between two log lines, the memory of other callbacks (EarlyStoppingCallback), and
    ``set_epoch`` of the dataset, which a resumed epoch would miss. The optimizer's file, two thirds of a full
    fine-tuning's checkpoint, is written while the training goes on.

    In the last step of an epoch a checkpoint waits for the evaluation and the log line that follow: the Trainer would
    skip them after a restart. Every evaluation can become a checkpoint by ``keep_best=("eval_loss", "min")``.

    Args:
        checkpoints: the manager, in its ``with`` block.

    Raises:
        CheckpointError: out of ``train``, for what cannot be made exact: data without a length, in an order that cannot
            be restored, or drawn with a global random state; settings such as ``save_only_model``; several processes.
        StopRequested: out of ``train``, when the training was asked to stop; the step is saved.
    """

    def __init__(self, checkpoints: CheckpointManager) -> None:
        self._checkpoints = checkpoints
        self._trainer: Any = None
        self._directory: Path | None = None  # that the training resumes from
        self._training = False
        self._in_epoch = False  # on_epoch_end is still to come
        self._optimizer: Any = None  # the state that belongs into the checkpoint in the making
        self._wanted = False  # a checkpoint of this step
        self._metrics: dict[str, float] = {}  # of the evaluations of this step
        self._evaluations = 0
        checkpoints.draw(lambda: self.history)

    @property
    def history(self) -> list[dict[str, Any]]:
        """``trainer.state.log_history``; ``epoch`` stands only in the records that end one."""
        records: list[dict[str, Any]] = []
        logged: list[dict[str, Any]] = self._trainer.state.log_history if self._trainer else []
        for record in logged:
            rest = {key: value for key, value in record.items() if key not in ("step", "epoch")}
            epoch = {"epoch": int(record["epoch"])} if _whole(record["epoch"]) else {}
            records.append({"step": record["step"], **epoch, **rest})
        return records

    def attach(self, trainer: Any, directory: Path | None) -> None:
        """Called by :class:`ResumableTrainer`: who trains, and from which directory it resumes."""
        self._trainer, self._directory = trainer, directory

    def write_later(self, optimizer: Any) -> None:
        """Called by :class:`ResumableTrainer`: the optimizer's state, which its checkpoint lacks."""
        self._optimizer = optimizer

    # ------------------------------------------------------------ called by the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self._trainer is None:
            raise CheckpointError(
                "CheckpointCallback was given to another Trainer than a ResumableTrainer, which cannot continue "
                "exactly. Use common.transformers.ResumableTrainer; for SFTTrainer and its like: "
                "class MyTrainer(ResumableTrainer, SFTTrainer)"
            )
        _check_trainer(self._trainer)
        _check_data(objects["train_dataloader"])
        self._training = True
        if self._directory is not None:
            self._resume(self._directory, state, objects)
        if state.global_step >= state.max_steps or _ended_early(self._directory):
            control.should_training_stop = True  # nothing is left; the Trainer alone might do one step more

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._in_epoch, self._metrics, self._evaluations = True, {}, 0
        self._ask(lambda: self._checkpoints.boundary(state.global_step, _later))
        self._decide(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._decide(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **_: Any) -> None:
        if not self._training:
            return
        self._metrics.update(without_clock(metrics))
        self._metrics.pop("epoch", None)
        self._evaluations += 1
        if self._evaluations >= len(_as_mapping(self._trainer.eval_dataset)):
            self._ask(lambda: self._checkpoints.epoch_boundary(self._metrics, _later, last=False))
        self._decide(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_epoch_stop:
            raise CheckpointError(
                "a callback set control.should_epoch_stop: the Trainer could not find its place after a restart. Stop "
                "the training instead, or make the epochs shorter"
            )
        self._in_epoch = False
        if args.eval_strategy == "no":
            self._ask(lambda: self._checkpoints.epoch_boundary({}, _later, last=False))
        self._decide(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nobody needs it
        trainer = self._trainer
        totals = {"loss": trainer._tr_loss.item(), "since_step": trainer._globalstep_last_logged}
        if hasattr(trainer, _TOKENS):
            totals["tokens"] = getattr(trainer, _TOKENS)
        (directory / _TOTALS).write_text(json.dumps(totals) + "\n")
        optimizer, self._optimizer = self._optimizer, None
        self._checkpoints.save_files(
            directory, step=state.global_step, epoch=int(state.epoch), metrics=dict(self._metrics), move=True,
            tree=optimizer, write=None if optimizer is None else _write_optimizer,
        )  # fmt: skip
        shutil.rmtree(directory)
        self._wanted = control.should_save = False
        self._checkpoints.stop_if_asked(lambda: None)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = False

    # ------------------------------------------------------------ how

    def _ask(self, question: Callable[[], None]) -> None:
        # The Trainer saves when its callbacks have returned. So the manager's call to save ends in an exception, and
        # the manager does not yet raise StopRequested, after which it would take no checkpoint any more.
        try:
            question()
        except _Later:
            self._wanted = True

    def _decide(self, state: Any, control: Any) -> None:
        if not self._training:
            return
        stops = control.should_training_stop
        self._wanted = self._wanted or stops or control.should_save
        epoch_ends = self._in_epoch and (stops or control.should_epoch_stop or _whole(state.epoch))
        control.should_save = self._wanted and not epoch_ends

    def _resume(self, directory: Path, state: Any, objects: Mapping[str, Any]) -> None:
        totals = json.loads((directory / _TOTALS).read_text())
        self._trainer._tr_loss.fill_(totals["loss"])
        self._trainer._globalstep_last_logged = totals["since_step"]
        if "tokens" in totals:
            setattr(self._trainer, _TOKENS, totals["tokens"])
        for callback in self._trainer.callback_handler.callbacks:
            saved = state.stateful_callbacks.get(type(callback).__name__)
            if isinstance(callback, _ExportableState) and saved is not None:
                for name, value in saved["attributes"].items():
                    setattr(callback, name, value)
        optimizer = getattr(objects["optimizer"], "optimizer", objects["optimizer"])
        print(
            f"[checkpoints] restored weights ({len(objects['model'].state_dict())} tensors), optimizer "
            f"({type(optimizer).__name__}, {len(optimizer.state_dict()['state'])} parameters), scheduler (learning "
            f"rate {objects['lr_scheduler'].get_last_lr()[0]:.6f}), random state, step {state.global_step}",
            flush=True,
        )


class ResumableTrainer(transformers.Trainer):
    """A Trainer that restores everything or says why not; it needs a :class:`CheckpointCallback`.

    For a subclass of Trainer: ``class MyTrainer(ResumableTrainer, SFTTrainer)``. What it changes:

    - Weights are restored strictly. Trainer resumes with ``load_state_dict(strict=False)`` and a warning, and so loses
      what ``save_pretrained`` stores under another name: the whole encoder of a ViT.
    - A finished training does not train again. Trainer does one step more when ``max_steps`` ends in mid-epoch, and
      goes on after early stopping.
    - The optimizer's file is written by the manager, in the background.
    - ``state.log_history`` has no clock times, which would make each checkpoint another one, and not the summary of
      ``train()``, which counts this process only. Callbacks get both.
    """

    def train(self, resume_from_checkpoint: Any = None, *arguments: Any, **options: Any) -> Any:
        """As in Trainer. ``resume_from_checkpoint`` is what :meth:`CheckpointManager.restore_files` returned.

        Raises:
            CheckpointError: there is not one CheckpointCallback, or ``resume_from_checkpoint`` is no such directory.
        """
        callbacks = [item for item in self.callback_handler.callbacks if isinstance(item, CheckpointCallback)]
        if len(callbacks) != 1:
            raise CheckpointError(f"ResumableTrainer has {len(callbacks)} CheckpointCallbacks: give it one")
        if isinstance(resume_from_checkpoint, bool):
            raise CheckpointError(
                f"resume_from_checkpoint is {resume_from_checkpoint}: True would take the newest directory, whole or "
                "not. Give it what checkpoints.restore_files() returns"
            )
        directory = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        missing = [name for name in _NEEDED if directory is not None and not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"resume_from_checkpoint is {directory}, which has no {', '.join(missing)}: without it the training "
                "would not go on as before. Give it what checkpoints.restore_files() returns"
            )
        self._checkpoint = callbacks[0]
        self.remove_callback(self._checkpoint)
        self.add_callback(self._checkpoint)  # last: it sees what the others decided
        self._checkpoint.attach(self, directory)
        parent: Any = super()
        return parent.train(None if directory is None else str(directory), *arguments, **options)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        parent: Any = super()
        parent.log(logs, *arguments, **options)
        record = self.state.log_history.pop()
        if "train_loss" not in record:
            self.state.log_history.append(without_clock(record))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.device.type not in ("cpu", "cuda"):  # others have files of their own
            parent: Any = super()
            parent._save_optimizer_and_scheduler(output_dir)
            return
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)
        self._checkpoint.write_later(self.optimizer.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        parent: Any = super()
        model = self.model if model is None else model
        kind = cast("Any", type(model))
        if not issubclass(kind, transformers.PreTrainedModel):  # an adapter, or a module that is saved under its names
            parent._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, report = kind.from_pretrained(
            resume_from_checkpoint, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
        wrong = {name: keys for name, keys in report.items() if keys}
        if wrong:
            raise CheckpointError(f"the checkpoint was made from another model than this {kind.__name__}: {wrong}")
        model.load_state_dict(saved.state_dict())

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        wrong = {"missing": load_result.missing_keys, "unexpected": load_result.unexpected_keys}
        if any(wrong.values()):
            raise CheckpointError(f"the checkpoint was made from another model: {wrong}")

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        if not self.control.should_training_stop:  # set by CheckpointCallback when nothing is left
            parent: Any = super()
            parent._run_epoch(*arguments, **options)


def _write_optimizer(state: Any, directory: Path) -> None:
    torch.save(state, directory / _OPTIMIZER)


class _Later(Exception):
    """The manager wants a checkpoint, the Trainer will make it."""


def _later() -> None:
    raise _Later


def _as_mapping(datasets: Any) -> Mapping[str, Any]:
    # the Trainer evaluates each of several datasets by itself
    return cast("Mapping[str, Any]", datasets) if isinstance(datasets, Mapping) else {"": datasets}


def _whole(epoch: float) -> bool:
    return epoch > 0 and float(epoch).is_integer()


def _ended_early(directory: Path | None) -> bool:
    if directory is None:
        return False
    saved = json.loads((directory / _STATE).read_text())
    stopped = saved["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    return stopped and saved["global_step"] < saved["max_steps"]


def _check_trainer(trainer: Any) -> None:
    for name, (wanted, why) in _SETTINGS.items():
        value = getattr(trainer.args, name)
        if value != wanted:
            value, wanted = repr(getattr(value, "value", value)), repr(wanted)
            raise CheckpointError(f"{name} is {value}, which cannot be continued exactly; it must be {wanted}: {why}.")
    if trainer.args.n_gpu > 1:
        raise CheckpointError(f"{trainer.args.n_gpu} GPUs are in use: set CUDA_VISIBLE_DEVICES to one of them.")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise CheckpointError("DeepSpeed and FSDP have checkpoints of their own, which this adapter does not know.")
    types = {str(value.dtype) for value in trainer.model.state_dict().values() if value.is_floating_point()}
    if isinstance(trainer.model, transformers.PreTrainedModel) and len(types) > 1:
        raise CheckpointError(
            f"the weights have several types, {', '.join(sorted(types))}: from_pretrained would load them as one."
        )
    names = [type(c).__name__ for c in trainer.callback_handler.callbacks if isinstance(c, _ExportableState)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise CheckpointError(f"there are several {twice[0]}s, and the Trainer mixes up what they remember: give one.")
    if hasattr(trainer, "_metrics") and trainer.args.logging_steps != 1:  # SFTTrainer and its relatives
        raise CheckpointError(
            f"logging_steps is {trainer.args.logging_steps}: {type(trainer).__name__} collects metrics between two log "
            "lines that are in no checkpoint. Set logging_steps=1."
        )


def _check_data(loader: Any) -> None:
    dataset: Any = loader.dataset
    if issubclass(type(dataset), IterableDataset) or not hasattr(dataset, "__len__"):
        raise CheckpointError(
            f"the training data are a {type(dataset).__name__} without a length: nobody can tell whether they come "
            "in the same order after a restart. Give a dataset with __len__ and __getitem__."
        )
    sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    if not (hasattr(loader, "set_epoch") and (hasattr(sampler, "set_epoch") or isinstance(sampler, SequentialSampler))):
        raise CheckpointError(
            f"the order of the training data comes from a {type(sampler).__name__}, which draws it from a random state "
            "that is gone after a restart. Take train_sampling_strategy='random' or 'sequential', or a sampler whose "
            "order is a function of set_epoch(epoch)."
        )
    places, before, batches = range(min(4, len(dataset))), _random_states(), list[str]()
    for _ in range(2):
        batch = loader.collate_fn([dataset[place] for place in places])
        tensors = {key: value for key, value in dict(batch).items() if isinstance(value, torch.Tensor)}
        batches.append(weights_digest(tensors))
    if _random_states() != before or batches[0] != batches[1]:
        raise CheckpointError(
            "reading a sample of the training data twice gives two results, or draws from a global random state: "
            "augmentation or masking that a restart would change. Make it a function of (epoch, index), "
            "torch.Generator().manual_seed(...); a dataset with set_epoch(epoch) is told the epoch."
        )


def _random_states() -> tuple[Any, ...]:
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))
    return random.getstate(), kind, keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()
