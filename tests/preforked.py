"""A command that takes long to import, started many times: imported once, then forked for each start.

``Preforked`` puts a stand-in of the command's name into a directory for the PATH. The stand-in hands its arguments,
directory, environment and standard streams to the process that has imported the real command, waits for the fork that
runs it there, and ends as that one ends. When the stand-in dies, the fork is killed. The parent only imports.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


class Preforked:
    """Serves ``command``; its real code is ``main``, ``"module:function"``. ``directory`` is for the PATH."""

    def __init__(self, command: str, main: str, imports: list[str]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="preforked-")
        self.directory = Path(self._scratch.name)
        address = self.directory / "socket"
        line = [sys.executable, __file__, str(address), main, *imports]
        env = {**os.environ, "PYTHONHASHSEED": "0"}  # what train.py asks for; a fork cannot choose another
        self._server = subprocess.Popen(line, stdin=subprocess.PIPE, env=env)
        stand_in = self.directory / command
        folder = str(Path(__file__).parent)
        stand_in.write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {folder!r})\nimport preforked\n"
            f"preforked.ask({str(address)!r})\n"
        )
        stand_in.chmod(0o755)

    def close(self) -> None:
        """End the process that imported."""
        self._server.stdin.close()
        self._server.wait()
        self._scratch.cleanup()


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
    for name in [*imports, module]:
        importlib.import_module(name)
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
        os.environ.update(request["env"])
        sys.argv = request["argv"]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3:])
