"""The python that has imported already behaves as one that has just been started."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import preforked
import pytest
import stand_in

SCRIPT = """
import atexit, os, random, signal, sys, time
from pathlib import Path
print(Path(sys.argv[0]).name, sys.argv[1:], sys.path[0], os.getcwd(), os.environ["GIVEN"], "decimal" in sys.modules)
print(random.random())
if sys.argv[1] == "set":
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"
    __import__("plistlib")
if sys.argv[1] == "imported":
    print([name for name in ("metaflow", "decimal", "zipapp", "plistlib") if name in sys.modules])
    __import__("zipapp")
if sys.argv[1] == "exit":
    atexit.register(print, "at exit")
    sys.exit(3)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "raise":
    raise RuntimeError("of the script")
if sys.argv[1] == "wait":
    print(os.getpid())
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    directory = tmp_path_factory.mktemp("example")
    (directory / "train.py").write_text("import decimal\nimport this_does_not_exist\nfrom metaflow import FlowSpec\n")
    (directory / "flow.py").write_text(SCRIPT)
    yield preforked.python_of(directory / "flow.py"), directory
    preforked.close()


def start(python, *arguments, **env):
    line = [python[0], "-u", str(python[1] / "flow.py"), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, text=True, cwd=python[1].parent, env={**os.environ, "GIVEN": "x", **env}, **streams)


def test_how_it_ends(python):
    ends = {}
    for word in ("exit", "kill", "raise"):
        process = start(python, word, "--option")
        output = process.communicate(timeout=900)[0]
        assert output.splitlines()[0] == f"flow.py ['{word}', '--option'] {python[1]} {python[1].parent} x True"
        ends[word] = process.returncode, output
    assert ends["exit"][0] == 3 and ends["exit"][1].endswith("at exit\n")
    assert ends["kill"][0] == -signal.SIGKILL
    assert ends["raise"][0] == 1 and "RuntimeError: of the script" in ends["raise"][1]
    drawn = {output.splitlines()[1] for _, output in ends.values()}
    assert len(drawn) == 3, "what is not seeded must differ from process to process"


def test_it_dies_with_its_stand_in(python):
    process = start(python, "wait")
    pid = int([process.stdout.readline() for _ in range(3)][-1])
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the script goes on without the process that started it")


def test_nothing_is_left_of_a_stand_in_that_is_killed_while_it_asks(either):
    folder = Path(either[0]).parent
    for asked in ([], [(1000).to_bytes(8, "little")], [(1000).to_bytes(8, "little"), b"{"]):
        with socket.socket(socket.AF_UNIX) as client:
            wait_for(lambda: (folder / "socket").exists())
            client.connect(str(folder / "socket"))
            for part in asked:
                socket.send_fds(client, [part], [0, 1, 2]) if len(part) == 8 else client.sendall(part)
    wait_for(lambda: len(served_from(folder)) == 1)


def served_from(folder):
    """The processes that serve commands from there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"{folder}/socket".encode() in path.read_bytes().split(b"\0"):
                found.append(path)
    return found


def wait_for(condition):
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.05)


PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.argv[1], "-u", sys.argv[2], "wait"])
time.sleep(60)
"""


@pytest.fixture(params=[True, False], ids=["of a gang", "alone"])
def either(request, tmp_path):
    (tmp_path / "flow.py").write_text(SCRIPT)
    command = preforked.Preforked("python", "preforked:script", [], of_a_gang=request.param)
    yield str(command.directory / "python"), str(tmp_path / "flow.py"), request.param
    command.close()


def test_a_process_of_a_gang_dies_with_the_one_that_started_it(either):
    """As it asks for itself. Other processes do not ask for it, and go on."""
    python, script, of_a_gang = either
    line = [sys.executable, "-c", PARENT, python, script]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, "GIVEN": "x"}) as parent:
        pid = int([parent.stdout.readline() for _ in range(3)][-1])
        parent.kill()
        time.sleep(1)
        assert Path(f"/proc/{pid}").exists() != of_a_gang
        if not of_a_gang:
            os.kill(pid, signal.SIGKILL)


def test_torchrun_and_its_ranks(tmp_path):
    # one write for each line: torchrun starts ranks with -u, and what print() writes piece by piece gets mixed
    (tmp_path / "rank.py").write_text(
        "import os, sys\nos.write(1, f\"{os.environ['RANK']} {sys.argv[1:]} {'decimal' in sys.modules}\\n\".encode())\n"
    )
    command = preforked.Preforked("python", "preforked:script", [*stand_in.MODULES, "decimal"], of_a_gang=True)
    line = [command.directory / "python", "-m", *stand_in.MODULES, "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*line, tmp_path / "rank.py", "given"], capture_output=True, text=True, timeout=900)
    command.close()
    assert sorted(done.stdout.splitlines()) == ["0 ['given'] True", "1 ['given'] True"], done.stderr


def test_what_it_cannot_do_is_done_by_the_real_one(python):
    done = subprocess.run([python[0], "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
    assert done.stdout.strip() == sys.executable
    other = start(python, "exit", HF_HOME="/somewhere/else").communicate()[0]
    assert other.splitlines()[0].endswith(" x False"), "an import could have read the other value"


def test_what_it_has_imported(python):
    """Metaflow only for the configuration that it has read; what a start imports late, the next one has."""

    def imported(**env):
        return start(python, "imported", **env).communicate()[0].splitlines()[-1]

    start(python, "set").wait()  # what it imports late may have seen what it set
    assert [imported(), imported()] == ["['metaflow', 'decimal']", "['metaflow', 'decimal', 'zipapp']"]
    assert imported(METAFLOW_RUN_ID="1") == "['metaflow', 'decimal', 'zipapp']", "it is not configuration"
    other = {"METAFLOW_DEFAULT_DATASTORE": "s3"}
    assert [imported(**other), imported(**other)] == ["['decimal']", "['decimal', 'zipapp']"]


def test_it_says_so_when_it_cannot_import(tmp_path):
    """A module that imports Metaflow by itself would hide its configuration from the starts that have another one."""
    script = tmp_path / "flow.py"
    script.write_text("from common import metaflow_store\nfrom metaflow import FlowSpec\n")
    done = subprocess.run([preforked.python_of(script), script], capture_output=True, text=True, timeout=900)
    preforked.close()
    assert done.returncode == 1 and "could not, see above" in done.stderr
