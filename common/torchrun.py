"""``@torchrun`` on a laptop: several nodes as local processes; and what ends a gang, in a sentence.

metaflow-torchrun 0.2.2 is made for Kubernetes and Batch. :func:`mend` makes it run on the local runtime, too; it
changes nothing anywhere else, nor in a later version (a test says when it can go).
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any, TextIO, cast

from metaflow.exception import MetaflowException

from .process import die_with_parent

_LAST_IN_NEED = (0, 2, 2)  # of metaflow-torchrun


class GangFailed(MetaflowException):
    """A node's ranks did not all end well; @retry starts the whole gang again."""

    headline = "Gang failed"


def mend() -> None:
    """Make ``@torchrun`` run on the local runtime. Call it at the top of the flow's file."""
    version = tuple(int(part) for part in re.findall(r"[0-9]+", metadata.version("metaflow-torchrun"))[:3])
    if version > _LAST_IN_NEED or os.environ.get("METAFLOW_RUNTIME_ENVIRONMENT", "local") != "local":
        return
    library = "metaflow_extensions.torchrun.plugins.torchrun_libs"
    decorator: Any = import_module(f"{library}.torchrun_decorator").TorchrunDecoratorParallel
    datastore: Any = import_module(f"{library}.datastore")
    executor: Any = import_module(f"{library}.executor")
    current: Any = import_module("metaflow").current
    parent: Any = decorator.__mro__[1]

    def this_interpreter(step_name: str) -> str:
        return sys.executable

    def doze(seconds: float) -> None:
        time.sleep(min(seconds, 1.0))

    def step_init(self: Any, flow: Any, graph: Any, step: Any, decos: Any, *rest: Any) -> None:
        shipped_step_init(self, flow, graph, step, decos, *rest)
        self.on_this_machine = not any(other.name in ("kubernetes", "batch") for other in decos)
        if self.environment.TYPE == "local":  # the other nodes start with this interpreter, not with "python"
            self.environment = SimpleNamespace(executable=this_interpreter)

    def runtime_step_cli(self: Any, cli_args: Any, retry_count: int, retries: int, ubf_context: Any) -> None:
        parent.runtime_step_cli(self, cli_args, retry_count, retries, ubf_context)
        if self.on_this_machine and ubf_context == "ubf_control":  # @checkpoint asks for it before the gang is set up
            cli_args.env["MF_PARALLEL_CONTROL_TASK_ID"] = str(cli_args.task.task_id)

    def task_pre_step(self: Any, *arguments: Any) -> None:
        shipped_task_pre_step(self, *arguments)
        parent.task_pre_step(self, *arguments)  # shipped without this call

    def storage_root(self: Any) -> str:
        return datastore.TORCHRUN_SUFFIX if self._backend.TYPE == "local" else shipped_root(self)

    def key_location(self: Any) -> str:
        # by attempt: otherwise a retry finds that all nodes have started, and that they have failed
        return os.path.join(shipped_location(self), str(current.retry_count))

    shipped_step_init, shipped_task_pre_step = decorator.step_init, decorator.task_pre_step
    decorator.step_init, decorator.task_pre_step = step_init, task_pre_step
    decorator.runtime_step_cli = runtime_step_cli
    store = datastore.TorchrunDatastore
    shipped_root, shipped_location = store.get_storage_root.fget, store.get_datastore_key_location
    store.get_storage_root, store.get_datastore_key_location = property(storage_root), key_location
    # the launcher dies with its task; nodes look every second how the others are, which is cheap here
    executor.subprocess = SimpleNamespace(PIPE=subprocess.PIPE, Popen=_launch)
    executor.time = SimpleNamespace(sleep=doze)


def _launch(command: list[str], **options: Any) -> Any:
    return subprocess.Popen(command, preexec_fn=die_with_parent, **options)


def arguments(timeout: float, port: int = 0) -> dict[str, Any]:
    """``torchrun_args`` of ``current.torch.run``.

    Args:
        timeout: seconds that a node waits for the others to start.
        port: where the ranks meet, on the control node; a retry takes the next one, as this one may be taken. 0: a
            number that follows from the run's id, so that two runs on a machine do not meet.
    """
    current: Any = import_module("metaflow").current
    if not port:
        port = 20_000 + sum(int(digits) for digits in re.findall(r"[0-9]+", current.run_id)) % 10_000
    return {"master_port": port + current.retry_count, "rdzv_conf": f"timeout={int(timeout)}"}


def origin() -> str:
    """The run that Metaflow's ``resume`` continues, if there is one and it has checkpoints to continue from, or "".

    For a manager in a process that ``@torchrun`` starts; one in the step itself knows it.
    """
    from .metaflow_store import Reader, Task, continued

    source = import_module("metaflow").current.origin_run_id
    if not source:
        return ""
    reader = Reader(rounds=None)
    return continued(source, Task.from_environment(), reader.backend, lambda path: reader.records(path)[0]) or ""


@contextmanager
def node() -> Generator[None]:
    """Around ``current.torch.run``: this node dies with its gang, and what ended a rank is said in a sentence.

    Raises GangFailed when ``current.torch.run`` fails.
    """
    die_with_parent()
    current: Any = import_module("metaflow").current
    errors = _Tee(sys.stderr)
    try:
        with redirect_stderr(cast("TextIO", errors)):
            yield
    except MetaflowException:  # torchrun's exit status, which says nothing
        parallel, attempt = current.parallel, current.retry_count
        raise GangFailed(
            f"node {parallel.node_index} of {parallel.num_nodes}, attempt {attempt}: {explanation(errors.text)}. "
            "@retry starts the whole gang again, from the newest checkpoint."
        ) from None


_KILLED = "was killed by SIGKILL (exit 137): out of memory, or its machine was taken away. Memory is set by @resources"
_EXPLANATIONS = (  # what torchrun and PyTorch write, and what it means
    (r"EADDRINUSE|[Aa]ddress already in use", "the port where the ranks meet is taken; the next attempt has another"),
    (r"Timed out after .* waiting for clients", "not all nodes started in time; --timeout says how long to wait"),
    (r"Timeout \([0-9:]+\)!", "a rank made no step within --timeout; the traceback above shows where it hung"),
    (r"RankLost", "a rank lost the others: one of them died or hangs, and its own node says why"),
    (r"StopRequested", "it was asked to stop; the state is saved"),
)


def explanation(log: str) -> str:
    """What ended the ranks of a node, from what torchrun wrote on its standard error."""
    killed = re.search(r"rank\s*:\s*([0-9]+) \(local_rank.*?\s+exitcode\s*:\s*-9 ", log)
    if killed:
        return f"rank {killed[1]} {_KILLED}"
    for pattern, meaning in _EXPLANATIONS:
        if re.search(pattern, log):
            return meaning
    return "a rank ended with an error, see above"


class _Tee:
    """Writes on, and keeps the last 100,000 characters."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.text = stream, ""

    def write(self, text: str) -> int:
        self.text = (self.text + text)[-100_000:]
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()
