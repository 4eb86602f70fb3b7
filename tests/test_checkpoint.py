"""The guarantees G1 to G10 of the manager, on a directory. test_metaflow_store.py has them on Metaflow's datastore."""

import collections
import contextlib
import errno
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
from gallery import REPO

import common.checkpoint
import common.stop
from common import (
    CheckpointError,
    CheckpointManager,
    ConfigChanged,
    FaultInjected,
    InvalidCheckpoint,
    StopRequested,
    TrainState,
    WriteFailed,
    scratch,
    stop,
)
from common.manifest import Manifest
from common.scratch import Scratch
from common.store import DirectoryStore


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


def test_saves_by_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(common.policy.time, "monotonic", lambda: clock[0])
    with CheckpointManager(tmp_path, save_every="3s", keep_last=100) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        for _ in range(10):
            clock[0] += 1
            checkpoints.step(state)
    assert saved(tmp_path) == [3, 6, 9], "every 3 s, not every step"


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


def test_the_approach_of_a_timeout_saves_and_stops(tmp_path, timeout, monkeypatch):
    monkeypatch.setattr(common.stop, "_MARGIN", 59.0)  # the alarm is far away, however long a step or the save takes
    timeout(60)
    with pytest.raises(StopRequested, match="@timeout is"):
        train_slowly(tmp_path)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0, "the hard alarm must stay armed"
    assert saved(tmp_path)


def test_without_the_watch_the_timeout_loses_the_steps(tmp_path, timeout, monkeypatch):
    """Negative control: nothing is due to be saved, so the alarm takes everything."""
    monkeypatch.setattr(common.stop.signal, "getitimer", lambda _: (0.0, 0.0))
    with pytest.raises(Alarm):
        timeout(1)
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
    parent.kill()
    parent.wait()
    limit = time.monotonic() + (1 if lives else 60)
    while is_alive(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    try:
        assert is_alive(pid) == lives
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):  # gone, perhaps while it is read
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


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


@pytest.mark.parametrize("moment", [("open", 1), ("check_names", 1), ("check_names", 2)])
def test_a_run_that_goes_on_can_be_continued(tmp_path, capsys, monkeypatch, moment):
    """What was listed may be deleted before it is opened, while it is read or while it is copied."""
    with CheckpointManager(tmp_path / "a", save_every=1, keep_last=1) as living:
        state = toy.new_state()
        living.restore(state, toy.CONFIG)

        def train_on():
            state.objects["model"].value += 1
            living.step(state)
            return living.latest  # waits for the save

        train_on()
        where, calls = DirectoryStore if moment[0] == "open" else common.checkpoint, []
        original = getattr(where, moment[0])

        def meanwhile(*arguments):
            result = original(*arguments)
            calls.append(moment[0])
            if len(calls) == moment[1]:
                train_on()
            return result

        monkeypatch.setattr(where, moment[0], meanwhile)
        continued = toy.new_state()
        with CheckpointManager(tmp_path / "b", resume_from=str(tmp_path / "a")) as checkpoints:
            checkpoints.restore(continued, toy.CONFIG)
            assert saved(tmp_path / "b") == [2] == [continued.step], "committed at once"
            assert (checkpoints.load_state(checkpoints.latest)["train_state"]["step"], continued.step) == (2, 2)
    assert (continued.objects["model"].value == state.objects["model"].value).all()
    assert "resumed at step 2" in (said := capsys.readouterr().out) and "rejected" not in said
    assert len(calls) > moment[1], "the moment never came"


def test_metrics_that_come_after_the_step_was_saved_are_saved_too(tmp_path):
    with CheckpointManager(tmp_path, save_every=1, keep_best=("loss", "min")) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state)
        checkpoints.step(state)
        checkpoints.save(state, {"loss": 1.0})
        checkpoints.save(state, {"loss": 1.0})  # nothing has happened since
        checkpoints.save(state)
        assert saved(tmp_path) == [1] and checkpoints.load_best()["train_state"]["step"] == 1
        assert len(list(tmp_path.glob("step-*"))) == 1, "of two of one step the newer stands for both"


def test_a_step_that_could_not_be_written_can_be_saved_again(tmp_path, monkeypatch):
    commit = DirectoryStore.commit
    with CheckpointManager(tmp_path, keep_best=("loss", "min")) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state)
        checkpoints.step(state)
        monkeypatch.setattr(DirectoryStore, "commit", raiser(OSError(errno.ENOSPC, "No space left on device")))
        checkpoints.save(state, {"loss": 1.0})
        with pytest.raises(WriteFailed, match="No space left"):
            _ = checkpoints.latest
        monkeypatch.setattr(DirectoryStore, "commit", commit)
        checkpoints.save(state, {"loss": 1.0})
        assert checkpoints.best and saved(tmp_path) == [1]


def raiser(error):
    def function(*arguments, **options):
        raise error

    return function


def test_a_deletion_that_fails_ends_no_training(straight, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DirectoryStore, "delete", raiser(PermissionError(errno.EACCES, "Permission denied")))
    assert toy.run(tmp_path, keep_last=1) == straight
    assert capsys.readouterr().out.count("could not be deleted and is left: [Errno 13] Permission denied") == 1
    monkeypatch.undo()
    assert toy.run(tmp_path, keep_last=1, steps=13) != straight
    assert len(saved(tmp_path)) <= 2, "the next attempt did not try again"


def test_somebody_else_deletes_links_and_copies(tmp_path, monkeypatch):
    """A copy beside the checkpoints is not theirs: it is neither restored nor deleted."""
    die(monkeypatch, tmp_path, "raise@step=7", keep_last=3)
    shutil.copytree(tmp_path / "step-00000006", tmp_path / "my_backup")
    (tmp_path / "newest").symlink_to("step-00000006")
    with CheckpointManager(tmp_path, save_every=1, keep_last=1) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        shutil.rmtree(tmp_path / "step-00000005")
        shutil.rmtree(tmp_path / "step-00000006")
        checkpoints.step(state)
        _ = checkpoints.latest
    assert (tmp_path / "my_backup/manifest.json").exists() and (tmp_path / "newest").is_symlink()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000007"]


def test_the_training_may_change_its_directory(straight, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with CheckpointManager("checkpoints", save_every=1, keep_best=("loss", "min")) as checkpoints:
        monkeypatch.chdir(tmp_path / "elsewhere")
        (checkpoints.directory / "mine").write_text("x")
        assert toy.digest(toy.train(checkpoints)) == straight
        with CheckpointManager(tmp_path / "elsewhere" / "other"):
            assert (checkpoints.directory / "mine").exists(), "another manager has swept it"
    assert saved(tmp_path / "checkpoints") and not (tmp_path / "elsewhere/checkpoints").exists()


def test_a_manager_leaves_the_directories_of_another_spelling_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = Scratch(Path("root")), Scratch(tmp_path / "root")
    assert first.path.exists() and second.path.exists()
    first.remove()
    second.remove()


def test_epochs_are_saved_by_time_alone(tmp_path):
    with CheckpointManager(tmp_path, save_every="0.05s") as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state)
        for _ in range(2):
            checkpoints.epoch_end(state)
            time.sleep(0.06)
        checkpoints.epoch_end(state)
        assert checkpoints.latest is not None


def test_restoring_in_the_middle_waits_for_what_is_being_saved(tmp_path):
    with CheckpointManager(tmp_path, save_every=1) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state)
        for _ in range(5):
            checkpoints.step(state)
        back = toy.new_state()
        assert checkpoints.restore(back) and back.step == 5


def test_no_room_for_the_first_line_of_the_log(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    manager = CheckpointManager(tmp_path)
    monkeypatch.setattr(manager._events, "_append", raiser(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(WriteFailed, match="No space left on device.*Free some space"), manager:
        pass
    assert signal.getsignal(signal.SIGTERM) == before


class WithGroups(toy.Weights):
    def __init__(self, lr):
        super().__init__()
        self.param_groups = [{"params": [0], "lr": lr, "betas": (0.9, 0.99)}]

    def state_dict(self):
        return {"value": self.value, "groups": self.param_groups}

    def load_state_dict(self, state):
        self.value, self.param_groups = state["value"], state["groups"]


def test_what_a_changed_configuration_does_not_change_is_said(tmp_path, capsys):
    """The optimizer brings its learning rate along, also where the user has asked for another one."""
    for lr in (0.1, 0.2):
        with CheckpointManager(tmp_path, save_every=1, allow_changes=True) as checkpoints:
            state = TrainState(model=toy.Weights(), optimizer=WithGroups(lr))
            checkpoints.restore(state, {"learning_rate": lr})
            checkpoints.step(state)
    said = capsys.readouterr().out
    assert "learning_rate: 0.1 -> 0.2" in said
    assert said.count("kept as in the checkpoint: optimizer.lr 0.1 (not 0.2); to change it set it after") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": "2"}, "keep_last is '2'"),
        ({"keep_last": 2.5}, "keep_last is 2.5"),
        ({"keep_best": "loss"}, "keep_best is 'loss': write"),
        ({"keep_best": ("loss",)}, "write .metric, direction"),
        ({"keep_best": ("loss", "min", "2")}, "keep_best"),
        ({"keep_best": ("loss", "min", 0)}, "1 or more"),
        ({"save_every": "10,20"}, "save_every is '10,20'"),
        ({"save_every": "10m,1h"}, "save_every is '10m,1h'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointManager(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_bad_metrics_and_positions_are_refused(tmp_path):
    with CheckpointManager(tmp_path / "a", keep_best=("loss", "min")) as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state)
        for metrics, message in [
            ({0: 1.0}, "called 0: its name must be a string"),
            ({"step": 1.0}, "'step', which says where"),
            ({"loss": "0.5"}, "'0.5', which is not a number"),
            ({"loss": None}, "None, which is not a number"),
        ]:
            with pytest.raises(CheckpointError, match=message):
                checkpoints.epoch_end(state, {"loss": 1.0, **metrics})
        for step in ("3", -1, 2.0):
            with pytest.raises(CheckpointError, match="step is"):
                checkpoints.save_files(Path(__file__).parent, step=step)
    for source in (f"{tmp_path / 'a'}@²", f"{tmp_path / 'a'}@x"):
        with CheckpointManager(tmp_path / "b", resume_from=source) as checkpoints:  # noqa: SIM117
            with pytest.raises(CheckpointError, match="with STEP a number"):
                checkpoints.restore(toy.new_state())


def test_a_directory_to_continue_may_have_any_name(straight, tmp_path, monkeypatch):
    die(monkeypatch, tmp_path / "a@5", "raise@step=7", keep_last=3)
    assert toy.run(tmp_path / "b", resume_from=tmp_path / "a@5") == straight
    assert toy.run(tmp_path / "c", resume_from=f"{tmp_path}/a@5@6") == straight


def test_the_writer_needs_no_priority(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "setpriority", raiser(PermissionError(errno.EACCES, "Permission denied")))
    assert toy.run(tmp_path) == straight


POOLS = """
import multiprocessing, signal, sys, time
from common import CheckpointManager
with CheckpointManager(sys.argv[1]):
    for _ in range(20):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, 2]) == [1, 2]
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join(60)
    assert child.exitcode == -signal.SIGTERM, child.exitcode
print("ended")
"""


def test_processes_that_the_training_starts_can_be_terminated(tmp_path):
    """A forked child has the manager's handlers, which only note a signal: Pool.terminate() waited for ever."""
    line = [sys.executable, "-c", POOLS, str(tmp_path)]
    done = subprocess.run(line, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("ended\n"), done.stdout + done.stderr


def test_a_slow_start_does_not_count_as_a_slow_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stop.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stop.signal, "getitimer", lambda _: (6.0, 0.0))
    watch = stop.StopWatch()
    watch.start()
    try:
        clock[0] = 3.2
        assert watch.reason() is None and watch.may_be_last, "a second step like the first would not fit: save this one"
        clock[0] = 3.3
        assert watch.reason() is None and not watch.may_be_last
        clock[0] = 5.45
        assert re.fullmatch("@timeout is 0.[56] s away", watch.reason())
    finally:
        watch.end()


@pytest.fixture
def synced(monkeypatch):
    """The paths of the files that were synced, under whatever name they had then."""
    inodes, fsync = set(), os.fsync

    def note(fd):
        inodes.add(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    return inodes


def test_every_file_of_a_checkpoint_is_durable(tmp_path, synced, monkeypatch):
    """Also of a framework's own, of a copy of another run's, and Metaflow's records: older ones are deleted then."""
    (tmp_path / "files/deep").mkdir(parents=True)
    (tmp_path / "files/deep/x").write_text("x")
    with CheckpointManager(tmp_path / "a") as checkpoints:
        checkpoints.restore_files()
        checkpoints.save_files(tmp_path / "files", step=3)
    with CheckpointManager(tmp_path / "b", resume_from=tmp_path / "a") as checkpoints:
        assert checkpoints.restore_files()
    for name in "ab":
        files = [path for path in (tmp_path / name / "step-00000003").rglob("*") if path.is_file()]
        assert len(files) == 2 and {path.stat().st_ino for path in files} <= synced, name
    root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], ".metaflow")
    monkeypatch.setenv("METAFLOW_CHECKPOINT_UID", "Durable/1/train/7/same/scope/0")
    import metaflow

    toy.run(metaflow.Checkpoint(), keep_last=1, steps=1)
    files = [path for path in root.glob("mf.checkpoints/checkpoints/*/Durable/**/*") if path.is_file()]
    files = [path for path in files if path.name != "latest"]  # the list is used when that is lost
    assert len([path for path in files if path.suffix == ".metadata"]) == 2
    assert {path.stat().st_ino for path in files} <= synced, files


@pytest.mark.parametrize("step", ["", "@6"])
def test_a_kill_while_another_run_is_taken_over(tmp_path, monkeypatch, step):
    """Between its best checkpoint and its newest, which come in this order: a restart takes the newest."""
    die(monkeypatch, tmp_path / "a", "raise@step=7")
    source, commit = f"{tmp_path / 'a'}{step}", DirectoryStore.commit

    def killed_after_it(*arguments):
        commit(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    def start():
        keep = {"keep_best": ("loss", "min"), "resume_from": source, "allow_changes": True}
        with CheckpointManager(tmp_path / "b", **keep) as checkpoints:
            checkpoints.restore(toy.new_state(), {**toy.CONFIG, "learning_rate": 0.2})
            return checkpoints.resumed_from[-1], checkpoints.load_best()["train_state"]["step"]

    pid = os.fork()
    if pid == 0:
        DirectoryStore.commit = killed_after_it
        start()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert saved(tmp_path / "b") == [4]
    assert start() == (6, 4)
    assert start() == (6, 4), "once more, with two of its own"


def test_the_only_checkpoint_is_not_given_up_for_another_run(tmp_path, monkeypatch):
    """It was trained here, although the other run is further and has one of the same step."""
    die(monkeypatch, tmp_path / "a", "raise@step=7")
    with CheckpointManager(tmp_path / "b") as checkpoints:
        state = toy.new_state()
        checkpoints.restore(state, toy.CONFIG)
        state.step, state.epoch = 4, 1
        checkpoints.save(state, {"loss": 1.0})
    with CheckpointManager(tmp_path / "b", keep_best=("loss", "min"), resume_from=str(tmp_path / "a")) as checkpoints:
        checkpoints.restore(state, toy.CONFIG)
        assert checkpoints.resumed_from == [4]


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


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "flipped"])
def test_a_start_that_finds_the_best_one_damaged_keeps_the_next_best(tmp_path, capsys, how):
    """Else the damaged one would be what later epochs are compared with, and none of them would be saved."""

    def life(directory, losses):
        with CheckpointManager(directory, save_every="1h", keep_last=1, keep_best=("loss", "min", 2)) as checkpoints:
            state = toy.new_state()
            checkpoints.restore(state, toy.CONFIG)
            for loss in losses:
                checkpoints.step(state)
                checkpoints.epoch_end(state, {"loss": loss})
            checkpoints.save(state)  # the newest, with no metric

    life(tmp_path, [0.3, 0.1, 0.9])
    assert saved(tmp_path) == [1, 2, 3]
    damage(tmp_path / "step-00000002" / "state.json", how)
    damage(tmp_path / "step-00000001" / "state.safetensors", how)
    capsys.readouterr()
    life(tmp_path, [0.5, 0.7])
    said = capsys.readouterr().out.splitlines()[0]
    assert "resumed at step 3" in said
    assert "rejected the best, step 2 (state.json" in said and "the best, step 1 (state.safetensors" in said
    assert saved(tmp_path) == [4, 5], "the next best was not kept, or a damaged one was"
    with CheckpointManager(tmp_path, keep_best=("loss", "min")) as checkpoints:
        checkpoints.restore(toy.new_state(), toy.CONFIG)
        assert checkpoints.load_best()["train_state"]["step"] == 4


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
            assert begun.wait(300)
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


def test_a_sweep_beside_a_process_that_is_just_beginning(monkeypatch, tmp_path):
    """Its directory is listed as .new and has its final name a moment later."""
    (tmp_path / "scratch-gone.new").mkdir()
    (tmp_path / "scratch-left").mkdir()
    (tmp_path / "scratch-left" / ".lock").touch()
    found = list(tmp_path.glob("scratch-*"))
    (tmp_path / "scratch-gone.new").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(Path, "glob", lambda path, pattern: found)
    assert scratch.sweep(tmp_path) == [tmp_path / "scratch-left"]
