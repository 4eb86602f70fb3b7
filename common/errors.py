"""The errors that a user of the checkpoint layer can meet. All are ordinary exceptions, so ``@retry`` retries them."""


class CheckpointError(Exception):
    """Something about a checkpoint is wrong; the message says what happened and what to do."""


class InvalidCheckpoint(CheckpointError):
    """A checkpoint is damaged or incomplete: a file is missing, cut short or altered."""


class ConfigChanged(CheckpointError):
    """A checkpoint was made under another configuration, data set or environment."""


class WriteFailed(CheckpointError):
    """The background writer could not commit a checkpoint; the ones committed before are intact."""


class StopRequested(CheckpointError):
    """The training was asked to stop (SIGTERM, Ctrl-C, the approach of ``@timeout``) and has saved its state."""


class FaultInjected(CheckpointError):
    """The environment variable FAULTS asked for this error."""
