"""Isolation of every test run, discovery of the examples, and the runs that tests share."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# before metaflow is imported anywhere: its configuration is read once
_SCRATCH = tempfile.TemporaryDirectory(prefix="gallery-tests-", ignore_cleanup_errors=True)
_ROOT = Path(_SCRATCH.name)
os.environ.update(
    METAFLOW_USER="tester",
    METAFLOW_HOME=str(_ROOT / "home"),
    METAFLOW_DATASTORE_SYSROOT_LOCAL=str(_ROOT),
    METAFLOW_CARD_LOCALROOT=str(_ROOT / "cards"),
    METAFLOW_DEFAULT_DATASTORE="local",
    METAFLOW_DEFAULT_METADATA="local",
    CUDA_VISIBLE_DEVICES="",
    HF_HUB_OFFLINE="1",
    HF_HOME=str(_ROOT / "hf"),
    TF_CPP_MIN_LOG_LEVEL="2",
    OMP_NUM_THREADS="1",  # two threads on two busy cores spend their time waiting for each other
)
(_ROOT / ".metaflow").mkdir()  # the datastore: a test that looks for a run that is not there may be the first of all
os.environ.pop("FAULTS", None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings  # noqa: E402

settings.load_profile("ci")  # no limits of time: a machine may be busy

import gallery  # noqa: E402
import preforked  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--example", action="append", help="test only this example (may be repeated)")
    parser.addoption("--all", action="store_true", help="also run what does not fit into the ordinary suite")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: runs with --all only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with --all"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "example" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--example")
        examples = [example for example in gallery.discover() if not chosen or example.name in chosen]
        unknown = set(chosen or []) - {example.name for example in examples}
        if unknown:
            raise pytest.UsageError(f"--example {unknown.pop()}: there is no such directory with an example.toml")
        own = ("test_examples", "test_copy")  # these run the example
        parameters = []
        for one in examples:
            # one worker does all tests of an example, so that its runs are made once
            marks = [pytest.mark.xdist_group(one.name)]
            if one.has_own_environment and not chosen and metafunc.module.__name__.endswith(own):
                reason = f"{one.name} has an environment of its own: make test EX={one.name}, which make test does, too"
                marks.append(pytest.mark.skip(reason=reason))
            parameters.append(pytest.param(one, id=one.name, marks=marks))
        metafunc.parametrize("example", parameters, scope="session")


@pytest.fixture(scope="session", autouse=True)
def preforked_commands(pytestconfig: pytest.Config) -> Iterator[None]:
    """In an example's own environment, a command that takes long to import is imported once; see preforked.py."""
    chosen = pytestconfig.getoption("--example") or []
    specs = [one.toml["preforked"] for one in gallery.discover() if one.name in chosen and "preforked" in one.toml]
    commands = [preforked.Preforked(**spec) for spec in specs]
    path = os.environ["PATH"]
    os.environ["PATH"] = os.pathsep.join([*(str(command.directory) for command in commands), path])
    yield
    os.environ["PATH"] = path
    for command in commands:
        command.close()
    preforked.close()


@pytest.fixture(scope="session")
def straight_run(example: gallery.Example, pytestconfig: pytest.Config) -> gallery.FlowRun:
    """The example's flow with its smoke arguments, left alone; with --all by a python that has imported nothing yet.

    Its sets iterate in another order than those of the runs that are compared with it.
    """
    python = sys.executable if pytestconfig.getoption("--all") else None
    return gallery.run_flow(example, *example.smoke, python=python, env={"PYTHONHASHSEED": "1"})


@pytest.fixture(scope="session")
def trainings(example: gallery.Example) -> Iterator[gallery.Trainings]:
    """Runs of the example's train.py in forked children; see zygote.py."""
    trainings = gallery.Trainings(example)
    yield trainings
    trainings.close()
