"""The state of a training: everything that decides what the next step does."""

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any, Protocol, cast

import numpy as np

from .encoding import History, plain_metrics
from .errors import CheckpointError


class Stateful(Protocol):
    """An object that can be saved: modules, optimizers, schedulers, scalers and most samplers are."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class TrainState:
    """Objects with a ``state_dict``, the position in the training, its history, and the random states.

    ``TrainState(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler)`` names the objects; the field's usual
    names are model, optimizer, lr_scheduler, scaler. The random states of Python, numpy and torch (also of every CUDA
    device) come on their own; those of other frameworks, such as Keras's seed generators, must be in an object.

    Attributes:
        step: optimizer steps done.
        epoch: epochs finished.
        step_in_epoch: optimizer steps done in the epoch in progress.
        history: one record per logged step, oldest first.
    """

    def __init__(self, **objects: Stateful) -> None:
        for name, value in objects.items():
            if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
                raise CheckpointError(
                    f"TrainState: {name} is a {type(value).__name__}, which has no state_dict() and load_state_dict()"
                )
            if name in ("train_state", "rng"):
                raise CheckpointError(f"TrainState: the name {name!r} is taken; choose another")
        self.objects = objects
        self.step = self.epoch = self.step_in_epoch = 0
        self.history = History()

    def log(self, metrics: Mapping[str, Any], **position: int) -> dict[str, Any]:
        """Append ``{"step": ..., **position, **metrics}`` to the history. Raises CheckpointError for NaN and such."""
        plain = plain_metrics(metrics, self.step)
        if taken := {"step", *position} & set(plain):
            raise CheckpointError(f"a metric is called {min(taken)!r}, which says where it was recorded: rename it")
        self.history.append({"step": self.step, **position, **plain})
        return plain

    def state_dict(self) -> dict[str, Any]:
        """Everything as one tree of dicts, tensors and numbers."""
        position = {"step": self.step, "epoch": self.epoch, "step_in_epoch": self.step_in_epoch}
        return {
            **{name: value.state_dict() for name, value in self.objects.items()},
            "train_state": {**position, "history": self.history},
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the random states last. Raises CheckpointError on other parts."""
        saved = set(state) - {"train_state", "rng"}
        if saved != set(self.objects):
            raise CheckpointError(
                f"the checkpoint holds {sorted(saved)}, this TrainState has {sorted(self.objects)}: "
                "both must name the same objects"
            )
        for name, value in self.objects.items():
            value.load_state_dict(state[name])
        position = state["train_state"]
        self.step, self.epoch, self.step_in_epoch = position["step"], position["epoch"], position["step_in_epoch"]
        self.history = History(position["history"])
        set_rng_state(state["rng"])


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, numpy and, where it is imported, torch on every device.

    Other frameworks have their own: ``keras.utils.set_random_seed``, for instance, seeds TensorFlow and JAX, too.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of the random generators of Python, numpy and, where it is imported, torch and its CUDA devices."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {"python": random.getstate(), "numpy": (kind, keys, *rest)}
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        states["torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_rng_state(states: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` returned. Raises CheckpointError when the number of CUDA devices differs."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if "torch" in states:
        import torch

        torch.set_rng_state(states["torch"])
        if "cuda" in states:
            if torch.cuda.device_count() != len(states["cuda"]):
                raise CheckpointError(
                    f"the checkpoint holds the random states of {len(states['cuda'])} CUDA devices, "
                    f"this machine has {torch.cuda.device_count()}"
                )
            torch.cuda.set_rng_state_all(states["cuda"])


def weights_digest(weights: Mapping[str, Any]) -> str:
    """SHA-256 over name, dtype, shape and bytes of each tensor or array, in name order.

    Two models have the same digest exactly when they are equal bit for bit.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        if hasattr(value, "detach"):
            torch: Any = sys.modules["torch"]
            value = value.detach().cpu().contiguous()
            dtype, data = str(value.dtype).removeprefix("torch."), value.reshape(-1).view(torch.uint8).numpy()
        else:
            value = cast("Any", np.ascontiguousarray(value))
            dtype, data = value.dtype.name, value.reshape(-1).view(np.uint8)
        digest.update(f"{name}\0{dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the Hugging Face Trainer, without how long things took: that is no part of a history."""
    return {key: value for key, value in record.items() if not key.endswith(("_runtime", "_per_second"))}
