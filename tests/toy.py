"""A training small enough to run thousands of times: numpy weights, random noise, momentum, a metric."""

import random
from pathlib import Path
from typing import Any

import numpy as np

from common import CheckpointManager, TrainState, weights_digest

CONFIG = {"learning_rate": 0.1, "data": "toy"}


class Weights:
    """Something with a state_dict."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = np.full((8, 4), value, np.float32)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def new_state() -> TrainState:
    return TrainState(model=Weights(1.0), optimizer=Weights())


def train(checkpoints: CheckpointManager, steps: int = 12, epoch_steps: int = 4, config: Any = CONFIG) -> TrainState:
    """Train on with what ``checkpoints`` has; every ``epoch_steps`` an epoch ends with the metric ``loss``."""
    random.seed(1)
    np.random.seed(1)
    state = new_state()
    checkpoints.restore(state, config, total_steps=steps)
    model, optimizer = state.objects["model"], state.objects["optimizer"]
    while state.step < steps or state.step_in_epoch:
        if state.step_in_epoch < epoch_steps:
            noise = np.random.randn(8, 4).astype(np.float32) * np.float32(random.random())
            optimizer.value = optimizer.value * np.float32(0.9) + noise
            model.value = model.value - np.float32(0.1) * optimizer.value
            checkpoints.step(state, {"mean": float(model.value.mean())})
        if state.step_in_epoch == epoch_steps:
            checkpoints.epoch_end(state, {"loss": float(abs(model.value).sum())})
    return state


def digest(state: TrainState) -> tuple[str, list[dict[str, Any]]]:
    return weights_digest({"model": state.objects["model"].value, "optimizer": state.objects["optimizer"].value}), list(
        state.history
    )


def run(directory: Path, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    """One attempt in this process."""
    options = {"save_every": 1, "keep_best": ("loss", "min"), **options}
    training = {key: options.pop(key) for key in ("steps", "epoch_steps", "config") if key in options}
    with CheckpointManager(directory, **options) as checkpoints:
        return digest(train(checkpoints, **training))
