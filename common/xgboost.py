"""XGBoost in segments that can be continued exactly, and the callback that saves between them.

A step is a round. XGBoost's own continuation (``xgb_model=``) is exact only without sampling: the random generators
behind ``subsample``, ``colsample_*`` and DART live inside the booster and cannot be saved. So the training is cut into
segments, also when nobody interrupts it: each starts a new booster from the bytes of the model so far, with a seed of
its own. A segment is then a pure function of (model, data, parameters, seed), and a resumed training computes what the
uninterrupted one computes. The price: the predictions of the model so far are computed once per segment.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import xgboost
from xgboost import collective
from xgboost.callback import TrainingCallback

from .checkpoint import CheckpointManager
from .errors import CheckpointError
from .state import TrainState

_REFUSED = {
    "callbacks": "a callback begins anew in every segment, and no checkpoint has its state. For progress lines give "
    "report=... to CheckpointCallback",
    "early_stopping_rounds": "its patience begins anew in every segment. Give "
    "early_stopping=(metric, 'min' or 'max', rounds) to CheckpointCallback",
    "evals_result": "it would hold the last segment only. Read the history of the CheckpointCallback",
    "xgb_model": "the segments use it. To go on from the checkpoint of another training, give resume_from=... to "
    "CheckpointManager",
}


class CheckpointCallback(TrainingCallback):
    """Saves the model where a segment ends, and the evaluation history with it; decides on early stopping.

    XGBoost's ``TrainingCheckPoint`` keeps no history and is not exact; its ``EarlyStopping`` forgets its patience. Give
    this one to :func:`train_in_segments` or :func:`fit_in_segments`; ``xgboost.train`` by itself is refused.

    Args:
        checkpoints: the manager, in its ``with`` block. What falls due inside a segment is saved at the segment's end.
        config: what the result depends on, see :meth:`CheckpointManager.restore`. The number of rounds, ``segment`` and
            ``early_stopping`` are added to it.
        segment: rounds in a segment. The result depends on it.
        early_stopping: ``("val_logloss", "min", 20)``: stop after 20 rounds in which that metric did not get better,
            and return the model of its best round.
        report: called with the record of each segment's last round, for progress lines.

    Attributes:
        history: one record per round, ``{"step": 1, "train_logloss": 0.6, "val_logloss": 0.6}``: the names of the
            evaluation sets and metrics, joined by ``_``.
        best_round: the round with the best metric, counted from 1; None without ``early_stopping``.

    Raises:
        CheckpointError: for bad arguments.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        config: Mapping[str, Any],
        *,
        segment: int = 10,
        early_stopping: tuple[str, str, int] | None = None,
        report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        super().__init__()
        if segment < 1:
            raise CheckpointError(f"segment is {segment}: it must be 1 round or more")
        if early_stopping is not None and (early_stopping[1] not in ("min", "max") or early_stopping[2] < 1):
            raise CheckpointError(
                f"early_stopping is {early_stopping}: write (metric, 'min' or 'max', rounds) with 1 round or more"
            )
        self.early_stopping = early_stopping
        self.best_round: int | None = None
        self._best_value = 0.0
        self._checkpoints, self._config, self._segment, self._report = checkpoints, config, segment, report
        self._model = _Model()
        # stands at the last segment boundary: what can be saved at any time
        self._state = TrainState(model=self._model)
        self._pending: list[dict[str, Any]] = []  # the metrics of the rounds since
        self._metrics: dict[str, Any] = {}
        self._saved_step = 0
        self._segment_end: int | None = None
        self._finished = False

    @property
    def history(self) -> list[dict[str, Any]]:
        return list(self._state.history)

    def run(self, rounds: int, seed: int, fit_segment: Callable[[bytearray | None, int, int], Any]) -> bytearray:
        """Restore, then call ``fit_segment(model, rounds, seed)`` for each segment that is left.

        Returns the final model in UBJSON: that of the best round with ``early_stopping``, else that of the last.
        """
        if rounds < 1:
            raise CheckpointError(f"the number of rounds is {rounds}: it must be 1 or more")
        config = {**self._config, "rounds": rounds, "segment": self._segment, "early_stopping": self.early_stopping}
        state = self._state
        self._checkpoints.restore(state, config, total_steps=rounds)
        self._saved_step = state.step
        for record in state.history:
            self._finished = self._out_of_patience(record["step"], record)
        if self._finished and state.step < rounds:
            print(f"[checkpoints] early stopping ended this training at round {state.step}: all is done", flush=True)
        while state.step < rounds and not self._finished:
            count = min(self._segment - state.step % self._segment, rounds - state.step)
            self._segment_end = state.step + count
            self._finished = self._segment_end == rounds
            fit_segment(self._model.raw or None, count, seed + state.step)
        if self.best_round is None:
            return self._model.raw
        best = xgboost.Booster(model_file=self._model.raw)[: self.best_round]
        return best.save_raw("ubj")

    def before_training(self, model: Any) -> Any:
        """Refuse a training that is not cut into segments."""
        if self._segment_end is None:
            raise CheckpointError(
                "CheckpointCallback was given to XGBoost itself, which cannot continue exactly. Call train_in_segments "
                "or fit_in_segments of this module: they take the same arguments, and callback=CheckpointCallback(...)."
            )
        return model

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Record the round; save where the segment ends; say whether to stop."""
        metrics = {f"{data}_{name}": values[-1] for data, log in evals_log.items() for name, values in log.items()}
        self._pending.append(metrics)
        step = self._state.step + len(self._pending)
        stopped = self._out_of_patience(step, metrics)
        if step != self._segment_end and not stopped:
            # asked to stop here, the segment's beginning is what can be saved
            self._checkpoints.boundary(step, self._save, savable=False)
            return False
        self._finished = self._finished or stopped
        self._model.raw = model.save_raw("ubj")
        for record in self._pending:
            self._state.step += 1
            self._metrics = self._state.log(record)
        self._pending.clear()
        self._checkpoints.boundary(step, self._save)
        if self._finished:
            self._save()
        if self._report is not None:
            self._report(self._state.history[-1])
        return stopped

    def _save(self) -> None:
        if self._state.step > self._saved_step:
            self._checkpoints.save(self._state, self._metrics)
            self._saved_step = self._state.step

    def _out_of_patience(self, step: int, metrics: Mapping[str, Any]) -> bool:
        if self.early_stopping is None:
            return False
        metric, direction, rounds = self.early_stopping
        if metric not in metrics:
            raise CheckpointError(
                f"early_stopping names {metric!r}, but the metrics of a round are {sorted(set(metrics) - {'step'})}"
            )
        value = metrics[metric] if direction == "min" else -metrics[metric]
        if self.best_round is None or value < self._best_value:
            self.best_round, self._best_value = step, value
        return step - self.best_round >= rounds


class _Model:
    """The model as bytes: an array for the checkpoint."""

    def __init__(self) -> None:
        self.raw = bytearray()

    def state_dict(self) -> dict[str, Any]:
        return {"ubj": np.frombuffer(self.raw, dtype=np.uint8)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.raw = bytearray(state["ubj"])


def train_in_segments(
    params: Mapping[str, Any], dtrain: xgboost.DMatrix, num_boost_round: int, *, callback: CheckpointCallback,
    **arguments: Any,
) -> xgboost.Booster:  # fmt: skip
    """``xgboost.train`` in segments, from the newest checkpoint on.

    Args:
        params, dtrain, num_boost_round: as in ``xgboost.train``.
        callback: has the checkpoints, the segment length and early stopping; afterwards the history.
        arguments: ``evals``, ``obj``, ``custom_metric``, as in ``xgboost.train``. The functions must be pure.

    Raises:
        CheckpointError: for what cannot be continued exactly.
    """
    _refuse(params, arguments, callback)
    params = dict(params)
    seed = params.pop("random_state", 0)
    seed = _integer(params.pop("seed", seed), "seed")

    def fit_segment(model: bytearray | None, rounds: int, seed: int) -> None:
        xgboost.train({**params, "seed": seed}, dtrain, rounds, xgb_model=model, callbacks=[callback],
                      verbose_eval=False, **arguments)  # fmt: skip

    return xgboost.Booster(model_file=callback.run(num_boost_round, seed, fit_segment))


def fit_in_segments(model: Any, X: Any, y: Any, *, callback: CheckpointCallback, **arguments: Any) -> Any:
    """``model.fit(X, y)`` of ``XGBClassifier`` and its relatives in segments, from the newest checkpoint on.

    Args:
        model: the estimator with its parameters; ``n_estimators`` is the number of rounds.
        X, y: as in ``fit``.
        callback: has the checkpoints, the segment length and early stopping; afterwards the history.
        arguments: ``eval_set`` (``validation_0``, ... in the history), ``sample_weight``, ..., as in ``fit``.

    Returns:
        ``model``, fitted.

    Raises:
        CheckpointError: for what cannot be continued exactly.
    """
    options: dict[str, Any] = model.get_params()
    _refuse(model.get_xgb_params(), {**options, **arguments}, callback)
    seed = _integer(0 if model.random_state is None else model.random_state, "random_state")

    def fit_segment(raw: bytearray | None, rounds: int, seed: int) -> None:
        part = type(model)(**{**options, "n_estimators": rounds, "random_state": seed, "callbacks": [callback]})
        part.fit(X, y, xgb_model=raw, verbose=False, **arguments)

    model.load_model(callback.run(model.get_num_boosting_rounds(), seed, fit_segment))
    return model


def _integer(value: Any, name: str) -> int:
    if not isinstance(value, (int, np.integer)):
        raise CheckpointError(f"{name} is {value!r}: give a whole number, each segment gets a seed derived from it")
    return int(cast("int", value))


def _refuse(params: Mapping[str, Any], arguments: Mapping[str, Any], callback: CheckpointCallback) -> None:
    for name, why in _REFUSED.items():
        if arguments.get(name) is not None:
            raise CheckpointError(f"{name} cannot be continued exactly: {why}.")
    booster = params.get("booster") or "gbtree"
    if booster not in ("gbtree", "dart"):
        raise CheckpointError(f"booster is {booster!r}: only gbtree and dart can be continued exactly.")
    if params.get("process_type") not in (None, "default"):
        raise CheckpointError(f"process_type is {params['process_type']!r}: only 'default' can be continued exactly.")
    if booster == "dart" and callback.early_stopping is not None:
        raise CheckpointError(
            "early_stopping with booster='dart': DART changes the weights of earlier trees, so the model of the best "
            "round cannot be cut out of a later one. Take booster='gbtree', or a fixed number of rounds."
        )
    if collective.get_world_size() > 1:
        raise CheckpointError(
            f"{collective.get_world_size()} workers train together: checkpoints are made by one process only."
        )
