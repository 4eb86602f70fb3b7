"""A command that takes long to import, started many times: imported once, then forked for each start.

A flow is dozens of processes, each of which imports Metaflow, and some their framework for seconds, before they do
something; most of the suite's time was that. So the flows of the tests run on a ``python`` that has done its imports
already (:func:`python_of`), also those that an earlier start turned out to do late. Everything else is as it is: every
task is a process of its own, with its own random states, that dies by SIGKILL. With ``--all`` the uninterrupted run
that the others are compared with takes the real python; the gang whose nodes and ranks are watched dying always does.

``Preforked`` puts a stand-in of the command's name into a directory for the PATH. The stand-in hands its arguments,
directory, environment and standard streams to the process that has imported the real command, waits for the fork that
runs it there, and ends as that one ends. When the stand-in dies, the fork is killed. The parent only imports.
"""

import ast
import atexit
import contextlib
import gc
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
import traceback
from collections.abc import Mapping
from pathlib import Path

import stand_in


class Preforked:
    """Serves ``command``; its real code is ``main``, ``"module:function"``. ``directory`` is for the PATH.

    ``imports`` are names of modules or import statements. The processes of a gang die with those that start them.
    """

    def __init__(
        self, command: str, main: str, imports: list[str], env: Mapping[str, str] = os.environ, of_a_gang: bool = False
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="preforked-")
        self.directory = Path(self._scratch.name)
        address = self.directory / "socket"
        env, ask = dict(env), f"ask({str(address)!r})"
        if command == "python":
            by_metaflow = stand_in.seen_by_metaflow(env) if any(map(_is_metaflow, imports)) else None
            seen = f"{stand_in.seen_by_imports(env)!r}, {by_metaflow!r}"
            ask = f"ask_python({str(address)!r}, {sys.executable!r}, {seen}, {of_a_gang})"
        else:
            env["PYTHONHASHSEED"] = "0"  # what train.py asks for; a fork cannot choose another
        line = [sys.executable, __file__, str(address), main, *imports]
        self._server = subprocess.Popen(line, stdin=subprocess.PIPE, env=env)
        script = self.directory / command
        folder = str(Path(__file__).parent)
        script.write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {folder!r})\nimport stand_in\nstand_in.{ask}\n"
        )
        script.chmod(0o755)

    def close(self) -> None:
        """End the process that imported."""
        self._server.stdin.close()
        self._server.wait()
        self._scratch.cleanup()


_by_imports: dict[str, str] = {}  # what the imports have put into the environment
_python: dict[tuple[Path, str], Preforked] = {}  # of the script that was asked for last, for each environment


def python_of(script: Path, env: Mapping[str, str] = os.environ) -> str:
    """A ``python`` that has imported what a script imports, and what the other files of its example import.

    It has done so with the variables of ``env``; a process with others does it anew, as far as imports read them.
    """
    flow = script.with_name("flow.py")
    script = flow if flow.exists() else script
    key = script, json.dumps([stand_in.seen_by_imports(env), stand_in.seen_by_metaflow(env)])
    if key not in _python:
        if script not in {other for other, _ in _python}:
            close()
        of_a_gang = "num_parallel" in script.read_text()
        imports = [*_imports(script), *(stand_in.MODULES if of_a_gang else ())]
        _python[key] = Preforked("python", "preforked:script", imports, env, of_a_gang)
    return str(_python[key].directory / "python")


def close() -> None:
    """End what :func:`python_of` has started."""
    while _python:
        _python.popitem()[1].close()


def _imports(script: Path) -> list[str]:
    """The import statements, Metaflow's last: all of an example's, those at the top of a script."""
    example = script.name == "flow.py"
    own = {path.stem for path in script.parent.glob("*.py")} | {"__future__"}
    found: dict[str, None] = {}
    for path in sorted(script.parent.glob("*.py")) if example else [script]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree) if example else tree.body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if names and not {name.partition(".")[0] for name in names} & own:
                found[ast.unparse(node)] = None
    return sorted(found, key=_is_metaflow)


def _is_metaflow(statement: str) -> bool:
    name = [*statement.split(), ""][1]  # "import name", "from name import ..."; a bare name is not Metaflow's
    return name.partition(".")[0] == "metaflow" or name == "common.torchrun"  # which imports it


def serve(address: str, main: str, imports: list[str]) -> None:
    """Import, then fork for each stand-in that asks, until standard input ends.

    A fork of this process imports Metaflow as well, where that is among the imports, and serves an address of its own.
    """
    module, _, function = main.partition(":")
    sys.modules["preforked"] = sys.modules["__main__"]
    before = dict(os.environ)
    of_metaflow = [name for name in imports if _is_metaflow(name)]
    do_imports([*(name for name in imports if name not in of_metaflow), module])
    if of_metaflow:
        if "metaflow" in sys.modules:
            Path(f"{address}{stand_in.FAILED}").touch()
            raise SystemExit("an import other than Metaflow's imports Metaflow, which not every start may have")
        if os.fork() == 0:
            address += stand_in.WITH_METAFLOW
            do_imports(of_metaflow)
    late = Path(f"{address}-late")
    late.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(100)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        ready = select.select([listener, sys.stdin], [], [])[0]
        if sys.stdin in ready:
            os._exit(0)
        connection = listener.accept()[0]
        for note in late.glob("*.json"):
            do_imports(json.loads(note.read_text()))
            note.unlink()
        gc.freeze()  # what imports have made stays for good: a fork that collects garbage need not look through it
        _by_imports.update({name: value for name, value in os.environ.items() if before.get(name) != value})
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            with contextlib.suppress(BaseException):
                answer(connection, getattr(sys.modules[module], function), late)
            os._exit(1)
        connection.close()


def do_imports(names: list[str]) -> None:
    """Import modules by their name, or carry out import statements."""
    for name in names:
        with contextlib.suppress(Exception):  # of what only another environment has
            if " " in name:
                exec(name, {})
            else:
                importlib.import_module(name)


def note_imports(late: Path, before: set[str]) -> None:
    """Tell the process that imports what this fork of it had to import itself, so that the next one need not.

    Not the example's own modules, and none of Metaflow's: its command line is made for the flow that imports it.
    """
    names = []
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith((sys.prefix, sys.base_prefix)) and not name.startswith("metaflow"):
            names.append(name)
    if names:
        new = late / f"{os.getpid()}.new"
        new.write_text(json.dumps(sorted(names)))
        new.rename(new.with_suffix(".json"))


def answer(connection: socket.socket, main, late: Path) -> None:
    """Run the command in a fork of this fork; send how it ended, or kill it when nobody listens any more."""
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    request, wanted = b"", int.from_bytes(size, "little")
    while len(request) < wanted:
        part = connection.recv(wanted - len(request))
        if not part:
            os._exit(1)  # the stand-in was killed before it had said what it wants
        request += part
    pid = os.fork()
    if pid == 0:
        run(main, streams, json.loads(request), late)
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


def run(main, streams: list[int], request: dict, late: Path) -> None:
    """The command itself, as if it had just been started."""
    # by its file: to a project that was copied out, importing the gallery's package is an error
    runpy.run_path(str(Path(__file__).parent.parent / "common/process.py"))["die_with_parent"]()
    code, imported, seen = 1, set(sys.modules), None
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update({**_by_imports, **request["env"]})
        seen = stand_in.seen_by_imports(os.environ)
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
        if stand_in.seen_by_imports(os.environ) == seen:  # else they may have seen what was set in the meantime
            with contextlib.suppress(OSError):  # when everything ends, its directory may be gone
                note_imports(late, imported)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def script() -> None:
    """What ``python [-u] script.py ...`` does, or ``python -m module ...``."""
    sys.executable = sys.argv.pop(0)
    while sys.argv[0] == "-u":
        sys.argv.pop(0)
    sys.stdout.reconfigure(line_buffering=True, write_through=True)
    is_module = sys.argv[0] == "-m"
    sys.path[0] = str(Path.cwd() if is_module else Path(sys.argv[0]).resolve().parent)
    # a fork would draw the numbers that every other fork draws; what is not seeded must differ
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
    if is_module:
        sys.modules.pop(sys.argv[1], None)  # run_module does not want to find it there
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
        return
    # Metaflow puts some of its classes there when it is imported, to be found by pickle
    by_metaflow = {name: value for name, value in vars(sys.modules["preforked"]).items() if name not in _OWN}
    runpy.run_path(sys.argv[0], by_metaflow, run_name="__main__")


_OWN = {*globals(), "_OWN"}


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3:])
