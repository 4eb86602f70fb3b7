"""The checkpoint layer for Keras 3: one callback for ``model.fit``, on any backend."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from .checkpoint import CheckpointManager
from .errors import CheckpointError
from .state import TrainState

keras: Any = import_module("keras")  # it carries no types

# the attributes in which Keras's own callbacks remember what they have seen
_REMEMBERED = {
    "EarlyStopping": ("wait", "best", "best_epoch", "best_weights", "stopped_epoch"),
    "ReduceLROnPlateau": ("wait", "best", "cooldown_counter"),
}


def named_arrays(variables: Iterable[Any]) -> dict[str, Any]:
    """The values of Keras variables (``model.weights``) by names that are the same in every process.

    Keras numbers layers and seed generators through (``dense_3``), so the second model of a process has other paths
    than the first. Here the position counts and the path without these numbers follows: ``007 digits/dense/kernel``.
    """
    return {
        f"{position:03} {re.sub(r'_[0-9]+(?=[_/]|$)', '', variable.path)}": np.asarray(
            keras.ops.convert_to_numpy(variable)
        )
        for position, variable in enumerate(variables)
    }


class CheckpointCallback(keras.callbacks.Callback):
    """Brings a ``model.fit`` back, bit for bit, after any kill, also in the middle of an epoch.

    Keras has ``BackupAndRestore``, but that begins the interrupted epoch anew with the weights of its middle, leaves
    out the random states of Dropout and its like, forgets the history, and overwrites its files in place. This
    callback hands the model, the optimizer, the metrics and the position to the checkpoint manager instead, and tells
    the data pipeline which steps are left::

        checkpoint = CheckpointCallback(checkpoints, config)
        steps = tf.data.Dataset.from_generator(checkpoint.steps, output_signature=...)
        model.fit(steps.map(load_batch), steps_per_epoch=23, epochs=12, callbacks=[checkpoint])

    List it before callbacks that may end the training. What is random in the model must come from a SeedGenerator
    that a layer owns, as in all of Keras's layers; what is random in the data must be a function of what ``steps``
    yields.

    Args:
        checkpoints: the manager, in its ``with`` block.
        config: what the result depends on, as for :meth:`CheckpointManager.restore`.
        callbacks: EarlyStopping and ReduceLROnPlateau, given here instead of to ``fit``, so that their patience
            continues.

    Raises:
        CheckpointError: for what cannot be made exact: data that do not come from ``steps``, ``steps_per_execution``,
            several devices, a model without variables, another callback in ``callbacks``.
        StopRequested: out of ``fit``, when the training was asked to stop; the step is saved.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        config: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        keras.callbacks.Callback.__init__(self)
        self._checkpoints, self._config, self._callbacks = checkpoints, config, list(callbacks)
        # self.model is asked anew each time: with jax that is what brings the variables up to date
        self._metrics = _Metrics(lambda: self.model.metrics_variables)
        self._memory = _Memory(self._callbacks, lambda: self.model.stop_training)
        self._state = TrainState(
            model=_Variables(lambda: self.model.trainable_variables + self.model.non_trainable_variables),
            optimizer=_Variables(lambda: self.model.optimizer.variables),
            metrics=self._metrics,
            callbacks=self._memory,
        )
        self._steps = self._epochs = 1  # of the whole fit: steps in an epoch, epochs
        self._undo: dict[str, Any] | None = None  # what to put back after the trial batch of a resumed epoch
        self._cut = False  # whether stop_training is ours: it ends the rest of a resumed epoch
        self._drawn = self._trained = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record for each step and each epoch of the whole training; fit's own History begins at the restart."""
        return list(self._state.history)

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, step in the epoch), both from 0, of each step that is left. What the data is made from."""
        self._drawn = self._trained
        epoch, step = self._state.epoch, self._state.step_in_epoch
        if self._undo is not None:
            self._drawn += 1
            yield epoch, step - 1  # for the trial batch, see on_train_begin
        while epoch < self._epochs:
            while step < self._steps:
                self._drawn += 1
                yield epoch, step
                step += 1
            epoch, step = epoch + 1, 0

    def load_best(self) -> None:
        """Put the variables with the best metric of ``keep_best`` into the model. Raises InvalidCheckpoint."""
        self._state.objects["model"].load_state_dict(self._checkpoints.load_best()["model"])

    # ------------------------------------------------------------ called by fit

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        self._check(model)
        model.optimizer.build(model.trainable_variables)
        for callback in self._callbacks:
            callback.set_model(model)
            callback.set_params(self.params)
            callback.on_train_begin(logs)
        state = self._state
        self._metrics.wait = True
        restored = self._checkpoints.restore(state, self._config, total_steps=self._steps * self._epochs)
        if state.step_in_epoch > self._steps:
            raise CheckpointError(
                f"the checkpoint stands at step {state.step_in_epoch} of an epoch, but steps_per_epoch is now "
                f"{self._steps}: continue with the old one, or from a checkpoint at the end of an epoch"
            )
        # Keras creates metric variables in the first batch, so in mid-epoch there is nothing yet to restore them into.
        # The first batch after a restart is therefore on trial: the last one again, undone as soon as it is over.
        self._undo = copy.deepcopy(state.state_dict()) if restored and state.step_in_epoch else None
        self._metrics.wait = False
        # what BackupAndRestore sets, too; on_epoch_begin checks that it worked
        model._initial_epoch = self._epochs if self._memory.stopped else state.epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch != self._state.epoch:
            raise CheckpointError(
                f"fit begins with epoch {epoch}, but {self._state.epoch} are done: do not pass initial_epoch, "
                "CheckpointCallback sets it"
            )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        state = self._state
        self._trained += 1
        if self._trained > self._drawn:
            raise CheckpointError(
                "fit was given data that do not come from CheckpointCallback.steps(), so their order could not be "
                "restored (fit on arrays shuffles them with a random state that cannot be saved). Make each batch from "
                "what steps() yields: tf.data.Dataset.from_generator(checkpoint.steps, ...).map(load_batch)"
            )
        if self._undo is None:
            self._checkpoints.step(state, logs)
        else:
            state.load_state_dict(self._undo)
            self._undo = None
        model = self.model
        if state.step_in_epoch == self._steps > batch + 1 and not model.stop_training:
            model.stop_training = self._cut = True  # ends the epoch; on_epoch_end takes it back

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._cut:
            model = self.model
            model.stop_training = self._cut = False
        for callback in self._callbacks:
            callback.on_epoch_end(epoch, logs)
        self._checkpoints.epoch_end(self._state, logs)

    def on_train_end(self, logs: Any = None) -> None:
        model = self.model
        model._initial_epoch = None
        for callback in self._callbacks:
            callback.on_train_end(logs)

    def _check(self, model: Any) -> None:
        if not self.params["steps"]:
            raise CheckpointError("fit was called without steps_per_epoch: it tells where in an epoch a step is")
        if model.steps_per_execution != 1:
            raise CheckpointError(
                f"the model was compiled with steps_per_execution={model.steps_per_execution}: a checkpoint is taken "
                "between two steps, which needs 1"
            )
        if not model.built:
            raise CheckpointError("the model has no variables yet: begin it with keras.Input, or call it on a batch")
        replicas = getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)
        if replicas != 1 or keras.distribution.distribution() is not None:
            raise CheckpointError(
                "the model is distributed over several devices, which is not restored exactly: use one"
            )
        self._steps, self._epochs = self.params["steps"], self.params["epochs"]


class _Variables:
    """Keras variables as something with a state_dict."""

    def __init__(self, variables: Callable[[], list[Any]]) -> None:
        self._variables = variables

    def state_dict(self) -> dict[str, Any]:
        return named_arrays(self._variables())

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        variables = self._variables()
        mine = {name: tuple(value.shape) for name, value in named_arrays(variables).items()}
        other = {name: tuple(value.shape) for name, value in saved.items()}
        if mine != other:
            lines = [f"{name}: {other.get(name, '(absent)')} -> {mine.get(name, '(absent)')}"
                     for name in sorted({*mine, *other}) if mine.get(name) != other.get(name)]  # fmt: skip
            raise CheckpointError(
                "the checkpoint was made from another model or optimizer. Variables that differ, checkpoint -> now: "
                + "; ".join(lines)
            )
        for variable, value in zip(variables, saved.values(), strict=True):
            variable.assign(np.array(value))


class _Metrics(_Variables):
    """The same for the metrics' running means; while ``wait`` is set, what is restored is only kept."""

    wait = False
    _kept: Mapping[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._kept) if self.wait else super().state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if self.wait:
            self._kept = saved
        else:
            super().load_state_dict(saved)


class _Memory:
    """What callbacks have seen so far, and whether one of them has ended the training."""

    def __init__(self, callbacks: list[Any], stopping: Callable[[], bool]) -> None:
        self._callbacks, self._stopping, self.stopped = callbacks, stopping, False
        self._names: list[tuple[str, ...]] = []
        for callback in callbacks:
            kinds = [kind.__name__ for kind in type(callback).__mro__ if kind.__name__ in _REMEMBERED]
            if not kinds:
                raise CheckpointError(
                    f"callbacks has a {type(callback).__name__}: only {' and '.join(_REMEMBERED)} can be continued. "
                    "Give it to fit if it remembers nothing from one epoch to the next."
                )
            self._names.append(_REMEMBERED[kinds[0]])

    def state_dict(self) -> dict[str, Any]:
        seen = [
            {name: getattr(c, name) for name in names} for c, names in zip(self._callbacks, self._names, strict=True)
        ]
        return {"stopped": bool(self._stopping()), "seen": seen}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        if [set(seen) for seen in saved["seen"]] != [set(names) for names in self._names]:
            raise CheckpointError("the checkpoint was made with other callbacks: give the same ones in the same order")
        self.stopped = saved["stopped"]
        for callback, seen in zip(self._callbacks, saved["seen"], strict=True):
            for name, value in seen.items():
                setattr(callback, name, value)
