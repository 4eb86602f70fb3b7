"""The checkpoint layer under every example of this gallery.

It stands on Metaflow's ``@checkpoint`` and adds what a training needs to survive a kill: snapshots that are
committed as a whole, verified before use, kept and dropped by a rule, and restored bit for bit. Start with
:class:`CheckpointManager`; everything else is there to be used by it, or to be read.
"""

# Metaflow reads this name and ships the package with the code of a remote task. It imports this module in bare
# interpreters too, so nothing here may import more than the standard library: names are served on first use.
METAFLOW_PACKAGE_POLICY = "include"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data as data
    from . import hub as hub
    from . import publish as publish
    from . import report as report
    from .checkpoint import CheckpointManager
    from .errors import (
        CheckpointError,
        ConfigChanged,
        FaultInjected,
        InvalidCheckpoint,
        StopRequested,
        WriteFailed,
    )
    from .process import die_with_parent
    from .publisher import Publisher
    from .sampler import ResumableSampler
    from .state import TrainState, seed_everything, weights_digest

_HOME = {
    "CheckpointManager": "checkpoint",
    "CheckpointError": "errors",
    "ConfigChanged": "errors",
    "FaultInjected": "errors",
    "InvalidCheckpoint": "errors",
    "StopRequested": "errors",
    "WriteFailed": "errors",
    "Publisher": "publisher",
    "ResumableSampler": "sampler",
    "TrainState": "state",
    "die_with_parent": "process",
    "seed_everything": "state",
    "weights_digest": "state",
}

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "ConfigChanged",
    "FaultInjected",
    "InvalidCheckpoint",
    "Publisher",
    "ResumableSampler",
    "StopRequested",
    "TrainState",
    "WriteFailed",
    "die_with_parent",
    "seed_everything",
    "weights_digest",
]


_ROOMS = ("data", "hub", "publish", "report")  # modules that are used by name: common.report.confusion_matrix(...)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
