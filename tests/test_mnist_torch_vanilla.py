"""What is special about the first example: negative controls of the generic tests, a real hang, and the plain flow."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gallery import REPO, Example, FlowRun, Scenario, Trainings, run_flow
from preforked import python_of

EXAMPLE = Example(REPO / "mnist_torch_vanilla")
pytestmark = pytest.mark.xdist_group(EXAMPLE.name)


@pytest.fixture(scope="module")
def vanilla():
    trainings = Trainings(EXAMPLE)
    yield trainings
    trainings.close()


@pytest.mark.parametrize("protection", ["", "rng", "optimizer", "position", "history"])
def test_without_a_part_of_the_state_the_result_differs(vanilla, protection):
    """Negative control of test_killed_at_every_step: each part of the state is needed for the promise."""
    # SIGTERM, because its checkpoint is always that of step 4; SIGKILL may take the save in flight
    (answer,) = vanilla.run(Scenario(f"without {protection}", ["term@step=4", ""], sabotage=protection))
    assert "resumed at step 4" in answer["output"]
    result, straight = answer["result"], vanilla.straight
    same = result and all(result[key] == straight[key] for key in ("weights_digest", "history"))
    assert bool(same) == (protection == ""), answer["output"][-3000:]


def test_accuracy():
    run = run_flow(EXAMPLE, python=sys.executable)  # as a reader starts it
    assert run.data.accuracy >= 0.97
    assert "epoch 12/12" in run.output, "no line of progress"
    card = run.card_data("evaluate")
    assert "Confusion matrix" in card and f"{run.data.accuracy:.2%}" in card


def test_a_real_hang_is_ended_by_a_real_timeout(vanilla):
    """``hang`` never comes back; @timeout ends it, @retry starts it again. Nothing of it is in the result."""
    smoke = run_flow(EXAMPLE, *EXAMPLE.smoke)
    faults = "hang@step=7"
    run = run_flow(EXAMPLE, *EXAMPLE.smoke, "--with", "timeout:seconds=20", faults=faults)
    assert run.fired() == [faults] and "timed out" in run.output
    assert run.data.weights_digest == smoke.data.weights_digest and run.data.history == smoke.data.history


def test_mnist_itself_is_one_parameter_away(tmp_path):
    """The real data set goes through torchvision's own loader (a miniature of it, as there is no network here)."""
    import gzip
    import struct

    import numpy as np

    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 255, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, header, data in (
            ("images-idx3-ubyte", struct.pack(">IIII", 2051, count, 28, 28), images),
            ("labels-idx1-ubyte", struct.pack(">II", 2049, count), labels),
        ):
            (raw / f"{name}-{kind}").write_bytes(header + data.tobytes())
            (raw / f"{name}-{kind}.gz").write_bytes(gzip.compress(header + data.tobytes()))
    code = "import train; d = train.load_data('mnist'); print(d.train_images.shape, d.val_labels.shape, d.fingerprint)"
    env = {**os.environ, "PYTHONPATH": str(EXAMPLE.path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("(40, 28, 28) (10,)"), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs and batch_size must be 1 or more, not 0 and 64"),
        (["--dataset", "fashion"], "dataset is 'fashion': choose digits (offline) or mnist"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_written(arguments, message):
    run = run_flow(EXAMPLE, *arguments, check=False)
    assert run.returncode != 0 and message in run.output and run.events() == []


# -------------------------------------------------------------------- nothing but @checkpoint


SAY = """
import os, time
from pathlib import Path

def say(line):
    held = (Path(os.environ["HELD"]) / line).exists()  # asked first: the test takes it away when it sees the line
    print(line, flush=True)
    time.sleep(900 * held)
"""


def held_copy(folder: Path) -> Path:
    """The example, whose plain flow waits at the lines at which a test kills it: no kill can come too late."""
    if folder.exists():
        return folder  # one for all runs, so that its imports are made once
    folder.mkdir()
    for path in EXAMPLE.path.glob("*.py"):
        (folder / path.name).write_text(path.read_text())
    (folder / "saying.py").write_text(SAY)
    lines = r"print\((f\"(?:starts at|finished) epoch [^\"]*\"), flush=True\)"
    source, count = re.subn(lines, r'__import__("saying").say(\1)', (folder / "plain_flow.py").read_text())
    assert count == 2
    (folder / "plain_flow.py").write_text(source)
    before, head, after = (folder / "flow.py").read_text().partition("    def evaluate(self):\n")
    assert head
    (folder / "flow.py").write_text(f'{before}{head}        __import__("saying").say("evaluates")\n{after}')
    return folder


class PlainRun:
    """plain_flow.py as a subprocess, with something done to it when a line appears."""

    def __init__(
        self, *arguments: str, when: dict[str, Callable[[int], None]] | None = None, file: str = "plain_flow.py"
    ) -> None:
        self.cwd = Path(tempfile.mkdtemp(dir=os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]))
        script, held = held_copy(self.cwd.parent / "mnist_torch_vanilla_held") / file, self.cwd / "held"
        held.mkdir()
        for text in when or {}:
            (held / text).touch()
        command = [python_of(script), str(script), *arguments, "--run-id-file", "run_id"]
        flow = subprocess.Popen(
            command, cwd=self.cwd, env={**os.environ, "HELD": str(held)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        watchdog = threading.Timer(900, flow.kill)
        watchdog.start()
        waiting, self.output = dict(when or {}), ""
        for line in flow.stdout:
            self.output += line
            for text in [text for text in waiting if text in line]:
                (held / text).unlink()  # the next attempt does not wait there
                waiting.pop(text)(int(re.search(r"\(pid ([0-9]+)\)", line)[1]))
        flow.wait()
        watchdog.cancel()
        self.returncode, self.run_id = flow.returncode, (self.cwd / "run_id").read_text().strip()

    @property
    def data(self):
        return FlowRun(0, "", "PlainMnistFlow", self.run_id, self.cwd).data

    def starts(self) -> list[int]:
        return [int(epoch) for epoch in re.findall(r"starts at epoch ([0-9]+)", self.output)]


ARGUMENTS = ("run", "--epochs", "4", "--batch-size", "8")
STORE = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]) / ".metaflow/mf.checkpoints/checkpoints"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)  # the process behind this one dies with it, within 20 ms; see preforked.py


def stored() -> list[Path]:
    """The stored state files of PlainMnistFlow, oldest first."""
    return sorted(STORE.glob("artifacts/PlainMnistFlow/train/*/*/*/state.pt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def plain():
    run = PlainRun(*ARGUMENTS)
    assert run.returncode == 0, run.output[-3000:]
    return run


def test_a_kill_after_the_training_is_survived():
    """SIGKILL for the step that evaluates, which makes no checkpoints: @retry does it again."""
    run = PlainRun("run", *EXAMPLE.smoke, when={"evaluates": kill}, file="flow.py")
    assert run.returncode == 0 and run.output.count("Task is starting (retry)") == 1, run.output[-3000:]


def test_plain_survives_a_kill_but_repeats_the_epoch(plain):
    run = PlainRun(*ARGUMENTS, when={"finished epoch 2": kill})
    assert run.returncode == 0 and run.starts() == [0, 2], run.output[-3000:]
    assert run.data.weights_digest == plain.data.weights_digest and run.data.history == plain.data.history


def test_plain_overwrites_the_stored_checkpoint_of_the_attempt_before(plain):
    """H1: on a local datastore the file is a symlink into the store, and torch.save writes through it."""
    before = {}

    def note_and_kill(pid: int) -> None:
        kill(pid)
        path = stored()[-1]
        before[path] = hashlib.sha256(path.read_bytes()).hexdigest()

    run = PlainRun(*ARGUMENTS, when={"finished epoch 2": note_and_kill})
    ((path, digest),) = before.items()
    assert run.returncode == 0 and hashlib.sha256(path.read_bytes()).hexdigest() != digest


def test_plain_dies_for_good_of_a_truncated_file():
    """H2: nothing is verified, and the older checkpoint that is still there is never tried."""

    def truncate_and_kill(pid: int) -> None:
        kill(pid)
        path = stored()[-1]
        path.write_bytes(path.read_bytes()[:1000])

    run = PlainRun(*ARGUMENTS, when={"finished epoch 3": truncate_and_kill})
    assert run.returncode != 0 and run.output.count("Task is starting (retry)") == 4


def test_plain_starts_from_zero_in_silence_without_its_pointer():
    """H3: an unreadable ``latest`` is taken for none."""

    def empty_and_kill(pid: int) -> None:
        kill(pid)
        for path in STORE.glob("*/PlainMnistFlow/**/latest"):
            path.write_bytes(b"")

    run = PlainRun(*ARGUMENTS, when={"finished epoch 3": empty_and_kill})
    assert run.returncode == 0 and run.starts() == [0, 0]
    assert "rejected" not in run.output and "unreadable" not in run.output


def test_plain_starts_from_zero_after_resume():
    """H5: ``resume`` is another task, which has no checkpoints of its own."""
    kills = {f"finished epoch {n}": kill for n in (1, 2, 3, 4)}
    failed = PlainRun(*ARGUMENTS, when={**kills, "starts at epoch 4": kill})
    assert failed.returncode != 0, failed.output[-2000:]
    resumed = PlainRun("resume", "--origin-run-id", failed.run_id)
    assert resumed.returncode == 0 and resumed.starts() == [0]


def test_plain_keeps_every_checkpoint_for_ever(plain):
    task = STORE / "metadata" / "PlainMnistFlow" / plain.run_id / "train"
    assert len(list(task.glob("*/*.metadata"))) == 4


def test_the_list_in_the_readme_is_this_list():
    """Each line of the README's table names its test, and each test of the plain flow has its line."""
    named = set(re.findall(r"`(test_plain_\w+)`", (EXAMPLE.path / "README.md").read_text()))
    written = {name for name in globals() if name.startswith("test_plain_")}
    assert named == written
