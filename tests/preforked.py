"""A command that takes long to import, started many times: imported once, then forked for each start.

A flow is a dozen processes, each of which imports its framework for seconds before it does something; two thirds of the
suite's time were that. So the flows of the tests run on a ``python`` that has it imported already (:func:`python_of`).
Everything else is as it is: every task is a process of its own, with its own random states, that dies by SIGKILL. The
uninterrupted run of an example, which the others are compared with, takes the real python.

``Preforked`` puts a stand-in of the command's name into a directory for the PATH. The stand-in hands its arguments,
directory, environment and standard streams to the process that has imported the real command, waits for the fork that
runs it there, and ends as that one ends. When the stand-in dies, the fork is killed. The parent only imports.
"""

import ast
import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

_PREFIXES = ("PYTHONPATH", "PYTHONHASHSEED", "HF_", "TRANSFORMERS_", "KERAS_", "TF_", "OMP_", "MKL_", "CUDA_", "TORCH_")


class Preforked:
    """Serves ``command``; its real code is ``main``, ``"module:function"``. ``directory`` is for the PATH.

    ``imports`` are names of modules or import statements.
    """

    def __init__(self, command: str, main: str, imports: list[str]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="preforked-")
        self.directory = Path(self._scratch.name)
        address = self.directory / "socket"
        env, ask = dict(os.environ), f"ask({str(address)!r})"
        if command == "python":
            ask = f"ask_python({str(address)!r}, {sys.executable!r}, {_seen_by_imports(env)!r})"
        else:
            env["PYTHONHASHSEED"] = "0"  # what train.py asks for; a fork cannot choose another
        line = [sys.executable, __file__, str(address), main, *imports]
        self._server = subprocess.Popen(line, stdin=subprocess.PIPE, env=env)
        stand_in = self.directory / command
        folder = str(Path(__file__).parent)
        stand_in.write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {folder!r})\nimport preforked\npreforked.{ask}\n"
        )
        stand_in.chmod(0o755)

    def close(self) -> None:
        """End the process that imported."""
        self._server.stdin.close()
        self._server.wait()
        self._scratch.cleanup()


_by_imports: dict[str, str] = {}  # what the imports have put into the environment
_python: dict[str, Preforked] = {}  # of the example whose tests are running


def python_of(directory: Path) -> str:
    """A ``python`` that has imported what the files of an example import, but not Metaflow.

    What is no example gets the real one, and so does a gang: its nodes are processes of the control task and die with
    it, not with a stand-in.
    """
    flow = directory / "flow.py"
    if not flow.exists() or "num_parallel" in flow.read_text():
        return sys.executable
    if str(directory) not in _python:
        close()
        _python[str(directory)] = Preforked("python", "preforked:script", _imports(directory))
    return str(_python[str(directory)].directory / "python")


def close() -> None:
    """End what :func:`python_of` has started."""
    while _python:
        _python.popitem()[1].close()


def _imports(directory: Path) -> list[str]:
    own = {path.stem for path in directory.glob("*.py")} | {"metaflow", "__future__"}
    found: dict[str, None] = {}
    for path in sorted(directory.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if names and not {name.partition(".")[0] for name in names} & own:
                found[ast.unparse(node)] = None
    return list(found)


def _seen_by_imports(env: Mapping[str, str]) -> dict[str, str]:
    # what modules read when they are imported; Metaflow, which is not imported before the fork, reads its own later
    return {name: value for name, value in env.items() if name.startswith(_PREFIXES)}


def ask_python(address: str, python: str, environment: dict[str, str]) -> None:
    """The stand-in of ``python``: a script is run over there, anything else by the real one."""
    arguments = sys.argv[1:]
    while arguments[:1] == ["-u"]:
        arguments.pop(0)
    if not arguments or not arguments[0].endswith(".py") or _seen_by_imports(os.environ) != environment:
        os.execv(python, [python, *sys.argv[1:]])
    ask(address)


def ask(address: str) -> None:
    """The stand-in: have it run over there, and end with its status."""
    server = socket.socket(socket.AF_UNIX)
    for _ in range(1200):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            server.connect(address)
            break
        time.sleep(0.1)  # it is still importing
    request = json.dumps({"argv": sys.argv, "cwd": str(Path.cwd()), "env": dict(os.environ)}).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(request)
    answer = server.recv(100)
    code = int(answer) if answer else 1
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address: str, main: str, imports: list[str]) -> None:
    """Import, then fork for each stand-in that asks, until standard input ends."""
    module, _, function = main.partition(":")
    sys.modules["preforked"] = sys.modules["__main__"]
    before = dict(os.environ)
    for name in [*imports, module]:
        if " " not in name:
            importlib.import_module(name)
            continue
        with contextlib.suppress(ImportError):  # of what only another environment has
            exec(name, {})
    if main == "preforked:script" and "metaflow" in sys.modules:
        raise SystemExit("an import of the example's imports Metaflow, which reads its configuration from each process")
    _by_imports.update({name: value for name, value in os.environ.items() if before.get(name) != value})
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(100)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            return
        connection = listener.accept()[0]
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            with contextlib.suppress(BaseException):
                answer(connection, getattr(sys.modules[module], function))
            os._exit(1)
        connection.close()


def answer(connection: socket.socket, main) -> None:
    """Run the command in a fork of this fork; send how it ended, or kill it when nobody listens any more."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request, wanted = b"", int.from_bytes(size, "little")
    while len(request) < wanted:
        request += connection.recv(wanted - len(request))
    pid = os.fork()
    if pid == 0:
        run(main, streams, json.loads(request))
    for stream in streams:
        os.close(stream)
    while True:
        gone = bool(select.select([connection], [], [], 0.02)[0])
        if gone:
            os.kill(pid, signal.SIGKILL)
        done, status = os.waitpid(pid, 0 if gone else os.WNOHANG)
        if done:
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)


def run(main, streams: list[int], request: dict) -> None:
    """The command itself, as if it had just been started."""
    from common import die_with_parent

    die_with_parent()
    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update({**_by_imports, **request["env"]})
        sys.argv = request["argv"]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # waits for threads, as the end of any process does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def script() -> None:
    """What ``python [-u] script.py ...`` does."""
    sys.executable = sys.argv.pop(0)
    while sys.argv[0] == "-u":
        sys.argv.pop(0)
    sys.stdout.reconfigure(line_buffering=True, write_through=True)
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    # a fork would draw the numbers that every other fork draws; what is not seeded must differ
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3:])
