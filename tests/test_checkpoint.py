"""The guarantees G1 to G10 of the manager, on a directory. test_metaflow_store.py has them on Metaflow's datastore."""

import collections
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import toy

import common.checkpoint
import common.stop
from common import (
    CheckpointError,
    CheckpointManager,
    ConfigChanged,
    FaultInjected,
    InvalidCheckpoint,
    StopRequested,
    WriteFailed,
)
from common.manifest import Manifest


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The result of the uninterrupted training."""
    return toy.run(tmp_path_factory.mktemp("straight"))


def die(monkeypatch, directory: Path, fault: str, **options) -> None:
    """An attempt that ends with an injected exception."""
    monkeypatch.setenv("FAULTS", fault)
    with pytest.raises(FaultInjected):
        toy.run(directory, **options)
    monkeypatch.delenv("FAULTS")


def saved(directory: Path) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    manifests = [Manifest.read(path.parent) for path in directory.glob("*/manifest.json")]
    return [manifest.step for manifest in sorted(manifests, key=lambda manifest: manifest.sequence)]


def newest(directory: Path) -> Path:
    paths = [path.parent for path in directory.glob("*/manifest.json")]
    return max(paths, key=lambda path: Manifest.read(path).sequence)


def child(code: str, directory: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that can import toy."""
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport toy\n{textwrap.dedent(code)}"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=directory, env={**os.environ, **env}, capture_output=True, text=True
    )


# -------------------------------------------------------------------- G1 and G8: exact


@pytest.mark.parametrize("interval", [1, 3, None])
def test_an_error_at_any_step_changes_nothing(straight, monkeypatch, tmp_path, interval):
    for step in range(1, 13):
        directory = tmp_path / str(step)
        die(monkeypatch, directory, f"raise@step={step}", save_every=interval)
        assert toy.run(directory, save_every=interval) == straight


def test_many_attempts_change_nothing(straight, monkeypatch, tmp_path):
    for step in (2, 3, 4, 4, 9):
        die(monkeypatch, tmp_path, f"raise@step={step},attempt={len(list(tmp_path.glob('events/*')))}")
    assert toy.run(tmp_path) == straight


def test_a_finished_training_does_not_train_again(straight, tmp_path, capsys):
    toy.run(tmp_path)
    before = saved(tmp_path)
    assert toy.run(tmp_path) == straight
    assert saved(tmp_path) == before
    assert "resumed at step 12 (epoch 3); all steps are done, --fresh starts anew" in capsys.readouterr().out


def test_fresh_starts_anew(straight, tmp_path, capsys):
    toy.run(tmp_path)
    assert toy.run(tmp_path, fresh=True) == straight
    assert capsys.readouterr().out.count("attempt 0: found 0 checkpoints; training starts at step 0") == 2


def test_the_record_of_resumptions_survives(monkeypatch, tmp_path):
    die(monkeypatch, tmp_path, "raise@step=6")
    die(monkeypatch, tmp_path, "raise@step=9")
    with CheckpointManager(tmp_path) as checkpoints:
        toy.train(checkpoints)
    assert checkpoints.resumed_from == [5, 8]


# -------------------------------------------------------------------- G2: isolation


def test_what_is_restored_is_a_private_copy(tmp_path):
    toy.run(tmp_path)
    with CheckpointManager(tmp_path, keep_best=("loss", "min")) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        before = {path: path.read_bytes() for path in tmp_path.glob("step-*/*")}
        state.objects["model"].value[:] = 7
        files = checkpoints.load_files(checkpoints.latest)
        for path in files.iterdir():
            with open(path, "r+b") as file:  # in place, as torch.save does
                file.write(b"overwritten")
        assert {path: path.read_bytes() for path in tmp_path.glob("step-*/*")} == before
        assert checkpoints.load_best()["train_state"]["step"] in (4, 8, 12)


# -------------------------------------------------------------------- G3: commit


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped"])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_used(straight, monkeypatch, tmp_path, capsys, name, how):
    die(monkeypatch, tmp_path, "raise@step=7")
    assert saved(tmp_path)[-2:] == [5, 6]
    damage(newest(tmp_path) / name, how)
    assert toy.run(tmp_path) == straight
    said = capsys.readouterr().out.splitlines()[-1]
    assert "resumed at step 5" in said and "rejected step" in said and name in said


@pytest.mark.parametrize("name", ["evil.pkl", "more.tar", "sub/x.json"])
def test_a_file_that_does_not_belong_is_refused(monkeypatch, tmp_path, capsys, name):
    """G10: a pickle planted in a checkpoint is never read; the checkpoint is rejected."""
    die(monkeypatch, tmp_path, "raise@step=7")
    target = newest(tmp_path) / name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(pickle.dumps("boom"))
    toy.run(tmp_path)
    assert f"rejected step 6 ({name} does not belong to it)" in capsys.readouterr().out


def test_a_manifest_cannot_name_files_outside(tmp_path):
    toy.run(tmp_path)
    path = newest(tmp_path)
    body = json.loads((path / "manifest.json").read_text())
    body["files"]["../../secret"] = body["files"]["state.json"]
    del body["checksum"]
    body["checksum"] = common.manifest._checksum(body)
    (path / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(InvalidCheckpoint, match="outside"):
        Manifest.read(path)


def test_when_none_is_valid_it_says_so_loudly(straight, monkeypatch, tmp_path, capsys):
    die(monkeypatch, tmp_path, "raise@step=7")
    for path in tmp_path.glob("step-*/state.safetensors"):
        damage(path, "flipped")
    assert toy.run(tmp_path) == straight
    assert "NONE IS VALID, training starts again from step 0" in capsys.readouterr().out


def test_without_the_check_a_flipped_bit_would_be_trained_on(straight, monkeypatch, tmp_path):
    """Negative control of the tests above."""
    die(monkeypatch, tmp_path, "raise@step=7")
    path = newest(tmp_path) / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 2] ^= 1  # a bit of the first weight
    path.write_bytes(bytes(data))
    monkeypatch.setattr(common.checkpoint, "check_file", lambda *_: None)
    assert toy.run(tmp_path) != straight


def test_a_kill_while_writing_leaves_the_one_before(straight, tmp_path):
    killed = child("toy.run(toy.Path('.'))", tmp_path, FAULTS="kill@save=4")
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".staging/scratch-*/*/state.safetensors")), "it did not die in the middle of writing"
    assert saved(tmp_path)[-1] == 3
    assert toy.run(tmp_path) == straight
    assert len(list(tmp_path.glob(".staging/*"))) == 1, "what the kill left behind was not swept"


def test_a_live_writers_staging_is_not_swept(tmp_path):
    from common.scratch import Scratch, sweep

    code = """
import time
from pathlib import Path
from common.scratch import Scratch
scratch = Scratch(Path("."))
print("up", flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert owner.stdout.readline() == b"up\n"
        mine = Scratch(tmp_path)
        assert sweep(tmp_path) == [] and len(list(tmp_path.glob("scratch-*"))) == 2
    finally:
        owner.kill()
        owner.wait()
    assert len(sweep(tmp_path)) == 1
    mine.remove()
    assert not list(tmp_path.glob("scratch-*"))


# -------------------------------------------------------------------- G4: retention


def test_only_the_last_and_the_best_stay(tmp_path):
    history = toy.run(tmp_path, save_every=1, keep_last=2)[1]
    losses = {record["step"]: record["loss"] for record in history if "loss" in record}
    best = min(losses, key=losses.get)
    assert saved(tmp_path) == sorted({best, 11, 12})


def test_disk_use_does_not_grow_with_the_number_of_saves(tmp_path):
    def size(steps: int) -> int:
        directory = tmp_path / str(steps)
        toy.run(directory, steps=steps, epoch_steps=4, keep_best=None)
        return sum(path.stat().st_size for path in directory.glob("step-*/state.safetensors"))

    assert size(80) == size(8)


def test_a_named_checkpoint_is_never_deleted(tmp_path):
    with CheckpointManager(tmp_path, save_every=1, keep_last=1) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        checkpoints.step(state)
        checkpoints.save(state, name="before_the_change")
        for _ in range(5):
            checkpoints.step(state)
    assert sorted(path.parent.name for path in tmp_path.glob("*/manifest.json")) == [
        "before_the_change",
        "step-00000006",
    ]


def full_disk(tmp_path: Path) -> list[str]:
    """A command prefix that runs with a tiny file system at tmp_path/disk, or a skip."""
    prefix = ["unshare", "--mount", "--map-root-user"] if os.getuid() else ["unshare", "--mount"]
    mount = f"mount -t tmpfs -o size=400k tmpfs {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    probe = subprocess.run([*prefix, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no file system of its own can be mounted here: {probe.stderr.strip()}")
    return [*prefix, "sh", "-c", f'{mount} && exec "$@"', "sh"]


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import toy, numpy as np
from common import *
with CheckpointManager("disk/checkpoints", save_every=1, keep_last=1) as checkpoints:
    state = toy.new_state()
    checkpoints.restore(state, toy.CONFIG)
    state.objects["model"].value = np.zeros(25_000, np.float32)
    checkpoints.step(state); checkpoints.step(state); checkpoints.latest
    state.objects["model"].value = np.zeros(90_000, np.float32)
    try:
        checkpoints.step(state); checkpoints.latest
    except WriteFailed as error:
        print("ERROR", error)
with CheckpointManager("disk/checkpoints") as checkpoints:
    state = toy.new_state(); checkpoints.restore(state, toy.CONFIG); print("STEP", state.step)
"""
    done = subprocess.run(
        [*full_disk(tmp_path), sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ERROR the checkpoint of step 3 could not be written" in done.stdout
    assert "No space left on device; the checkpoint of step 2 is kept" in done.stdout
    assert "STEP 2" in done.stdout


def test_a_quota_keeps_the_old_checkpoint_too(tmp_path):
    code = """
    import resource, signal, numpy as np
    from common import *
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with CheckpointManager(".", save_every=1) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        checkpoints.step(state); checkpoints.latest
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        state.objects["model"].value = np.zeros(90_000, np.float32)
        try:
            checkpoints.step(state); checkpoints.step(state)
        except WriteFailed as error:
            print("ERROR", error)
    """
    done = child(code, tmp_path)
    assert "the checkpoint of step 1 is kept" in done.stdout, done.stdout + done.stderr
    assert saved(tmp_path) == [1] and resource


def test_saves_by_time(tmp_path):
    with CheckpointManager(tmp_path, save_every="0.2s", keep_last=100) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        began = time.monotonic()
        while time.monotonic() - began < 1:
            time.sleep(0.02)
            checkpoints.step(state)
    assert 2 <= len(saved(tmp_path)) <= 5, "about every 0.2 s, not every step"


# -------------------------------------------------------------------- G5: stopping


class Slow(toy.Weights):
    """Makes every step take a while, so that an alarm comes in the middle of the training."""

    def state_dict(self):
        return super().state_dict()


def train_slowly(directory: Path, seconds: float = 0.05, steps: int = 400) -> None:
    with CheckpointManager(directory, save_every=10_000) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        while state.step < steps:
            time.sleep(seconds)
            checkpoints.step(state)


class Alarm(Exception):
    """What Metaflow's TimeoutException is here."""


@pytest.fixture
def timeout():
    """``@timeout`` as Metaflow sets it: one SIGALRM, before the step begins, whose handler raises."""

    def ring(*_):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_the_approach_of_a_timeout_saves_and_stops(tmp_path, timeout):
    timeout(2)
    with pytest.raises(StopRequested, match="@timeout is"):
        train_slowly(tmp_path)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0, "the hard alarm must stay armed"
    assert saved(tmp_path)[-1] >= 5


def test_without_the_watch_the_timeout_loses_the_steps(tmp_path, timeout, monkeypatch):
    """Negative control: nothing is due to be saved, so the alarm takes everything."""
    monkeypatch.setattr(common.stop.signal, "getitimer", lambda _: (0.0, 0.0))
    timeout(1)
    with pytest.raises(Alarm):
        train_slowly(tmp_path)
    assert saved(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(straight, tmp_path, number):
    state = toy.new_state()
    with pytest.raises(StopRequested, match=f"stopped at step 3: {number.name} was received"):
        with CheckpointManager(tmp_path) as checkpoints:
            toy_steps(checkpoints, state, 2)
            os.kill(os.getpid(), number)
            toy_steps(checkpoints, state, 2)
    assert saved(tmp_path) == [3]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def toy_steps(checkpoints: CheckpointManager, state, count: int) -> None:
    if state.step == 0:
        checkpoints.restore(state, toy.CONFIG)
    for _ in range(count):
        checkpoints.step(state)


def test_a_broad_except_cannot_defeat_it(tmp_path):
    state, raised = toy.new_state(), 0
    with pytest.raises(StopRequested):
        with CheckpointManager(tmp_path) as checkpoints:
            toy_steps(checkpoints, state, 1)
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(3):
                try:
                    checkpoints.step(state)
                except Exception:
                    raised += 1
    assert raised == 3 and saved(tmp_path) == [2]


def test_a_signal_after_the_last_step_is_not_swallowed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with CheckpointManager(tmp_path) as checkpoints:
            toy_steps(checkpoints, toy.new_state(), 1)
            os.kill(os.getpid(), signal.SIGINT)


def test_the_second_ctrl_c_does_not_wait(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with CheckpointManager(tmp_path):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_a_spot_notice_saves_and_stops(tmp_path, monkeypatch):
    notice = tmp_path / "notice"
    monkeypatch.setattr(common.stop, "spot_notice", lambda: str(notice))
    monkeypatch.setattr(common.stop, "_NOTICE_INTERVAL", 0.0)
    with pytest.raises(StopRequested, match="spot termination notice"):
        with CheckpointManager(tmp_path / "c") as checkpoints:
            state = toy.new_state()
            toy_steps(checkpoints, state, 2)
            notice.touch()
            toy_steps(checkpoints, state, 1)
    assert saved(tmp_path / "c") == [3]


# -------------------------------------------------------------------- G6: one writer


def test_a_second_process_is_refused(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        toy_steps(checkpoints, toy.new_state(), 1)
        other = child("toy.run(toy.Path('.'))", tmp_path)
    assert "another process is writing checkpoints" in other.stderr
    checkpoints._close()
    assert child("toy.run(toy.Path('.'))", tmp_path).returncode == 0


def test_a_forked_worker_cannot_save(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        state = toy.new_state()
        toy_steps(checkpoints, state, 1)
        pid = os.fork()
        if pid == 0:
            try:
                checkpoints.step(state)
            except CheckpointError as error:
                os._exit(7 if "only one process may save" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_threads_cannot_mix_files(tmp_path):
    with CheckpointManager(tmp_path, save_every=1, keep_last=40) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        threads = [threading.Thread(target=toy_steps, args=(checkpoints, state, 10)) for _ in range(4)]
        state.step = 1  # toy_steps restores at step 0 only
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert saved(tmp_path) == list(range(2, 42))
    with CheckpointManager(tmp_path) as checkpoints:
        for path in tmp_path.glob("step-*"):
            assert checkpoints.load_state(str(path))["train_state"]["step"] == int(path.name[5:])


def test_a_failed_write_surfaces_at_the_next_call(tmp_path):
    with pytest.raises(WriteFailed, match="step 2 could not be written"):
        with CheckpointManager(tmp_path / "c", save_every=1) as checkpoints:
            state = toy.new_state()
            toy_steps(checkpoints, state, 1)
            checkpoints.latest  # noqa: B018
            shutil.rmtree(tmp_path / "c" / ".staging")
            (tmp_path / "c" / ".staging").write_text("in the way")
            toy_steps(checkpoints, state, 2)


ORPHAN = """
import subprocess, sys, time
from common import die_with_parent
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn={preexec})
print(grandchild.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("preexec", "lives"), [("die_with_parent", False), ("None", True)])
def test_children_die_with_their_parent(preexec, lives):
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN.format(preexec=preexec)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    time.sleep(0.5)
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        state = "gone"
    try:
        assert (state not in ("gone", "Z")) == lives
    finally:
        if state not in ("gone",):
            os.kill(pid, signal.SIGKILL)


# -------------------------------------------------------------------- G7: fingerprint


def test_another_configuration_is_refused_with_the_difference(tmp_path, capsys):
    toy.run(tmp_path)
    before = saved(tmp_path)
    changed = {"learning_rate": 0.2, "data": "toy", "new": {"a": 1}}
    with pytest.raises(ConfigChanged) as error:
        toy.run(tmp_path, config=changed)
    text = str(error.value)
    assert "learning_rate: 0.1 -> 0.2" in text and "new: (absent) -> {'a': 1}" in text and "data" not in text
    assert "allow_changes" in text and saved(tmp_path) == before
    toy.run(tmp_path, config=changed, allow_changes=True)
    assert "continuing on purpose" in capsys.readouterr().out


def test_another_environment_is_named_and_with_exact_refused(tmp_path, capsys, monkeypatch):
    toy.run(tmp_path)
    found = common.checkpoint.environment()
    monkeypatch.setattr(common.checkpoint, "environment", lambda: {**found, "numpy": "1.0", "threads": 64})
    toy.run(tmp_path)
    assert "numpy: " in (said := capsys.readouterr().out) and "-> 1.0" in said and "threads" in said
    with pytest.raises(ConfigChanged, match="With --exact that is refused"):
        toy.run(tmp_path, exact=True)


def test_another_training_can_be_continued(straight, tmp_path, monkeypatch):
    die(monkeypatch, tmp_path / "a", "raise@step=7", keep_last=3)
    source = {path: path.read_bytes() for path in (tmp_path / "a").glob("step-*/*")}
    assert toy.run(tmp_path / "b", resume_from=str(tmp_path / "a")) == straight
    assert toy.run(tmp_path / "c", resume_from=f"{tmp_path}/a@5") == straight
    assert source == {path: path.read_bytes() for path in (tmp_path / "a").glob("step-*/*")}


def test_what_is_continued_is_committed_at_once(tmp_path, monkeypatch):
    die(monkeypatch, tmp_path / "a", "raise@step=7")
    with CheckpointManager(tmp_path / "b", resume_from=str(tmp_path / "a"), keep_best=("loss", "min")) as checkpoints:
        checkpoints.restore(toy.new_state(), toy.CONFIG)
        assert saved(tmp_path / "b") == [4, 6], "the best one comes along"


@pytest.mark.parametrize(
    ("source", "message"), [("a@99", "Its steps: .*6"), ("nowhere", "no directory"), ("a@x", "STEP a number")]
)
def test_a_wrong_source_is_an_error(tmp_path, monkeypatch, source, message):
    die(monkeypatch, tmp_path / "a", "raise@step=7")
    with pytest.raises(CheckpointError, match=message):
        toy.run(tmp_path / "b", resume_from=str(tmp_path / source))
    assert saved(tmp_path / "b") == []


# -------------------------------------------------------------------- G9: bad input


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "../x", "ü", "x" * 101, "step-00000003", "events", "a b"])
def test_bad_names_are_refused_before_anything_is_written(tmp_path, name):
    with CheckpointManager(tmp_path) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        with pytest.raises(CheckpointError, match="name"):
            checkpoints.save(state, name=name)
    assert saved(tmp_path) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), object(), b"x", {1}])
def test_bad_metrics_are_refused_before_anything_is_written(tmp_path, value):
    with CheckpointManager(tmp_path, save_every=1) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        with pytest.raises(CheckpointError, match="metric 'loss' at step 1"):
            checkpoints.step(state, {"loss": value})
    assert saved(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [{"keep_last": 0}, {"save_every": "often"}, {"keep_best": ("loss", "up")}, {"place": 3}, {"place": None}],
)
def test_bad_options_are_refused(tmp_path, options):
    with pytest.raises(CheckpointError):
        CheckpointManager(**{"place": tmp_path / "c", **options})
    assert not (tmp_path / "c").exists()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        CheckpointManager(tmp_path / "file" / "checkpoints")


def test_an_unknown_fault_is_an_error_at_start(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULTS", "explode@step=1")
    with pytest.raises(CheckpointError, match="is not a fault"):
        CheckpointManager(tmp_path)


def test_the_metric_of_keep_best_must_be_there(tmp_path):
    with CheckpointManager(tmp_path, keep_best=("accuracy", "max")) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        with pytest.raises(CheckpointError, match=r"keep_best names 'accuracy'.*\['loss'\]"):
            checkpoints.epoch_end(state, {"loss": 1.0})


def test_other_objects_than_saved_are_refused(tmp_path):
    toy.run(tmp_path)
    with CheckpointManager(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="both must name the same"):
        checkpoints.restore(common.TrainState(model=toy.Weights()), toy.CONFIG)


def test_it_must_be_used_in_a_with_block(tmp_path):
    checkpoints = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointError, match="`with` block"):
        checkpoints.restore(toy.new_state(), toy.CONFIG)
    checkpoints._close()


# -------------------------------------------------------------------- G10 and the files of frameworks


def test_nothing_is_pickled(tmp_path):
    toy.run(tmp_path)
    assert {path.name for path in tmp_path.glob("step-*/*")} == {"state.safetensors", "state.json", "manifest.json"}
    source = "".join(path.read_text() for path in Path(common.__file__).parent.glob("*.py"))
    assert "import pickle" not in source and not re.search(r"load\([^)]*weights_only=False", source)


def test_files_of_a_framework_come_back_verified(tmp_path):
    made = tmp_path / "framework"
    (made / "sub").mkdir(parents=True)
    (made / "sub" / "weights").write_bytes(b"w" * 100)
    (made / "state.json").write_text("{}")
    with CheckpointManager(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_files(toy.CONFIG) is None
        checkpoints.save_files(made, step=3, metrics={"loss": 1.0})
        shutil.rmtree(made)  # frameworks delete theirs when they like
    with CheckpointManager(tmp_path / "c") as checkpoints:
        files = checkpoints.restore_files(toy.CONFIG)
        assert (files / "sub" / "weights").read_bytes() == b"w" * 100
        assert checkpoints.resumed_from == [3]
        (files / "sub" / "weights").write_bytes(b"mine now")
    damage(newest(tmp_path / "c") / "sub" / "weights", "flipped")
    with CheckpointManager(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_files(toy.CONFIG) is None


def test_the_best_one_damaged_is_named_and_the_next_taken(monkeypatch, tmp_path, capsys):
    toy.run(tmp_path, keep_best=("loss", "min", 2), keep_last=1)
    with CheckpointManager(tmp_path, keep_best=("loss", "min", 2)) as checkpoints:
        checkpoints.restore(toy.new_state(), toy.CONFIG)
        best = Path(checkpoints.best)
        damage(best / "state.json", "flipped")
        other = checkpoints.load_best()["train_state"]["step"]
    assert other != Manifest.read(best).step
    assert f"the best checkpoint, step {Manifest.read(best).step}, is damaged: state.json" in capsys.readouterr().out


def test_the_same_for_the_files_of_a_framework(tmp_path):
    made = tmp_path / "framework"
    made.mkdir()
    with CheckpointManager(tmp_path / "c", keep_best=("loss", "min", 2)) as checkpoints:
        checkpoints.restore_files(toy.CONFIG)
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.9)):
            (made / "weights").write_text(str(step))
            checkpoints.save_files(made, step=step, metrics={"loss": loss})
        assert (checkpoints.load_best_files() / "weights").read_text() == "2"
        damage(Path(checkpoints.best) / "weights", "flipped")
        assert (checkpoints.load_best_files() / "weights").read_text() == "1"
    with CheckpointManager(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match="needs .*keep_best"):
        checkpoints.load_best_files()


def test_what_is_written_in_the_background_is_a_copy(tmp_path):
    """G6 for a framework's own file: the tree may change when save_files returns; no memory but its own is stored."""
    torch = pytest.importorskip("torch", reason="torch is not among this example's requirements")
    tied, begun, go_on = torch.ones(1000), threading.Event(), threading.Event()
    tree = {"model": collections.OrderedDict(a=tied, b=tied, bf16=torch.ones(3, dtype=torch.bfloat16)),
            "optimizer": {"state": {0: {"step": torch.tensor(1.0), "empty": torch.zeros(0, 2)}}, "lr": 0.1},
            "sparse": torch.eye(2).to_sparse(),
            "parameter": torch.nn.Parameter(torch.ones(5)), "view": torch.arange(10.0)[2:4]}  # fmt: skip

    def write(copied, directory):
        begun.set()
        go_on.wait()
        torch.save(copied, directory / "state.pt")

    with CheckpointManager(tmp_path / "checkpoints") as checkpoints:
        checkpoints.restore_files()
        (tmp_path / "empty").mkdir()
        for step in (1, 2):  # the second uses the same memory
            tied.fill_(step)
            go_on.clear()
            checkpoints.save_files(tmp_path / "empty", step=step, tree=tree, write=write)
            assert begun.wait(10)
            tied.zero_()
            tree["optimizer"]["lr"] = 0.2
            go_on.set()
            path = checkpoints.load_files(checkpoints.latest) / "state.pt"
            saved = torch.load(path, weights_only=True)
            assert torch.equal(saved["model"]["a"], torch.full((1000,), float(step)))
            assert saved["model"]["a"].data_ptr() == saved["model"]["b"].data_ptr(), "tied tensors stay tied"
            assert type(saved["model"]) is collections.OrderedDict and saved["model"]["bf16"].dtype == torch.bfloat16
            assert saved["optimizer"]["state"][0]["empty"].shape == (0, 2) and saved["optimizer"]["lr"] == 0.1 * step
            assert saved["view"].tolist() == [2.0, 3.0] and saved["parameter"].requires_grad
            assert torch.equal(saved["sparse"].to_dense(), torch.eye(2)), (
                "what safetensors does not know is copied, too"
            )
            assert path.stat().st_size < 2 * tied.nbytes
