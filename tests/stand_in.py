"""What is started in place of a command that preforked.py has imported already. It imports next to nothing itself."""

import json
import os
import select
import socket
import sys
import time

_PREFIXES = ("PYTHONPATH", "PYTHONHASHSEED", "HF_", "TRANSFORMERS_", "KERAS_", "TF_", "OMP_", "MKL_", "CUDA_", "TORCH_")
# what Metaflow tells its tasks about themselves; the rest of METAFLOW_* is configuration, which it reads when imported
_OF_A_TASK = ("METAFLOW_RUN_ID", "METAFLOW_CHECKPOINT_TASK_IDENTIFIER", "METAFLOW_CHECKPOINT_UID")
_READ_LATER = "TORCH_NCCL_"  # torchrun gives it to its ranks, and they read it when they join
MODULES = ("torch.distributed.run",)  # what `python -m` may name
FAILED = "-failed"  # ends the name of the file that says that nobody will listen
WITH_METAFLOW = "-metaflow"  # ends the address of the process that has imported Metaflow, too


def seen_by_imports(env) -> dict[str, str]:
    """The variables that frameworks read when they are imported."""
    found = {name: value for name, value in env.items() if name.startswith(_PREFIXES)}
    return {name: value for name, value in found.items() if not name.startswith(_READ_LATER)}


def seen_by_metaflow(env) -> dict[str, str]:
    """The variables that Metaflow reads when it is imported."""
    return {name: value for name, value in env.items() if name.startswith("METAFLOW_") and name not in _OF_A_TASK}


def ask_python(
    address: str, python: str, by_imports: dict[str, str], by_metaflow: dict[str, str] | None, of_a_gang: bool
) -> None:
    """The stand-in of ``python``: a script is run over there, anything else by the real one."""
    arguments = sys.argv[1:]
    while arguments[:1] == ["-u"]:
        arguments.pop(0)
    is_script = arguments[:1] and (arguments[0].endswith(".py") or (arguments[0] == "-m" and arguments[1] in MODULES))
    if not is_script or seen_by_imports(os.environ) != by_imports:
        os.execv(python, [python, *sys.argv[1:]])
    ask(f"{address}{WITH_METAFLOW}" if seen_by_metaflow(os.environ) == by_metaflow else address, of_a_gang)


def ask(address: str, of_a_gang: bool = False) -> None:
    """Have it run over there, and end with its status.

    The processes of a gang ask to die with their parents; over there, that is not who started them, but here it is.
    """
    parent = os.getppid()
    server = socket.socket(socket.AF_UNIX)
    for _ in range(9000):
        try:
            server.connect(address)
            break
        except (FileNotFoundError, ConnectionRefusedError):
            if os.access(address.removesuffix(WITH_METAFLOW) + FAILED, os.F_OK):
                sys.exit("the process that should have done the imports could not, see above")
            time.sleep(0.1)  # it is still importing
    else:
        sys.exit("the process that does the imports takes too long, or has died")
    cwd = os.getcwd()  # noqa: PTH109 - pathlib takes longer to import than all the rest
    request = json.dumps({"argv": sys.argv, "cwd": cwd, "env": dict(os.environ)}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(request)
    while of_a_gang and not select.select([server], [], [], 0.02)[0]:
        if os.getppid() != parent:
            os._exit(1)  # which ends what runs over there
    answer = server.recv(100)
    code = int(answer) if answer else 1
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)
