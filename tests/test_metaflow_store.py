"""The manager on Metaflow's own datastore: real flows, whose toy training takes no time."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import toy
from gallery import REPO, Example, FlowRun, run_flow
from preforked import python_of

from common import CheckpointManager

TESTS, TOY = Example(REPO / "tests"), REPO / "tests/toy_flow.py"


def toy_flow(*arguments: str, **options) -> FlowRun:
    return run_flow(TESTS, *arguments, file="toy_flow.py", flow_name="ToyFlow", **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return toy.run(tmp_path_factory.mktemp("straight"))


def only(data, name):
    (value,) = getattr(data, name)
    return value


@pytest.mark.xdist_group("toy_contract")
def test_contract_with_the_library(straight):
    """What the private parts are used for, what the public API accepts, and the way back without them."""
    from metaflow import Checkpoint

    data = toy_flow("--case", "contract").data
    checks = only(data, "checks")
    latest = only(data, "latest_checkpoint")
    assert latest in Checkpoint().list(task=latest["pathspec"]), "Metaflow does not list the manager's reference"
    assert (only(data, "digest"), only(data, "history")) == straight
    assert checks["private"], "metaflow-checkpoint has moved: commits copy again, see common/metaflow_store.py"
    assert checks["copies"] == 0, "a commit on the local datastore must not copy"
    assert checks["plain"] == checks["plain_again"] == "plain"
    assert "could write outside" in checks["tar"]
    assert set(checks["listed"]) >= {"mine", "packed", "step-00000012"} and checks["newest_first"]
    assert checks["types"] == ["int"]
    assert checks["loaded"] == only(data, "files") == ["manifest.json", "state.json", "state.safetensors"]
    assert checks["writable"] == []
    assert checks["fallback_resumed"] == 12 and checks["fallback_latest"] == 14 and checks["fallback_restored"] == 14


@pytest.mark.xdist_group("toy_damage")
def test_every_damage_is_named_and_survived(straight):
    """An unreadable pointer, record, state and a lost folder: each attempt meets another (H2, H3)."""
    faults = ";".join(f"raise@step={step}" for step in (5, 7, 9, 11))
    run = toy_flow("--case", "damage", faults=faults)
    data = run.data
    assert (only(data, "digest"), only(data, "history")) == straight
    rejected = [event["rejected"] for event in run.events() if event["event"] == "found"]
    assert rejected[0] == []
    assert "the pointer 'latest' is unreadable" in rejected[1][0]
    assert "is mended from its copy" in rejected[2][0]
    assert "state.safetensors: its hash differs" in rejected[3][0]
    assert "manifest.json is missing" in rejected[4][0]
    assert "the best, step 8 (state.json: 2 bytes instead of" in rejected[4][-1]
    assert only(data, "resumed_from") == [4, 6, 7, 9], "each time the newest valid one"
    assert only(data, "checks")["torn"] == [], "the half-written files of a killed attempt were not swept"


@pytest.mark.xdist_group("toy_children")
def test_processes_of_one_task_cannot_mix_their_files(straight):
    data = toy_flow("--case", "children").data
    checks = only(data, "checks")
    assert checks["exits"] == [0, 0, 0]
    assert checks["saved"] == [first + n for first in (100, 200, 300) for n in (1, 2, 3, 4, 5)]


@pytest.mark.xdist_group("toy_children")
def test_a_second_training_in_one_task_is_refused():
    """It would be given the weights of the first, and say that all steps are done."""
    checks = only(toy_flow("--case", "twice").data, "checks")
    assert checks.pop("on purpose") == 16
    assert list(checks) == ["fold 0", "fold 1"]
    for message in checks.values():
        assert "an earlier CheckpointManager has trained in this attempt" in message and "foreach" in message


@pytest.mark.xdist_group("toy_resume")
def test_resume_and_resume_from_continue(straight):
    """A run that failed for good is continued by ``resume``, and any checkpoint of it by a new run (H5)."""
    dying = ";".join(f"raise@step={step}" for step in (3, 5, 6, 8, 9))
    failed = toy_flow(faults=dying, check=False)
    assert failed.returncode != 0
    # a resumed run that dies before it saves anything must not lose the origin's place
    nothing = toy_flow("--origin-run-id", failed.run_id, command="resume", faults="explode", check=False)
    assert nothing.returncode != 0
    resumed = toy_flow("--origin-run-id", nothing.run_id, command="resume")
    assert (only(resumed.data, "digest"), only(resumed.data, "history")) == straight
    assert only(resumed.data, "resumed_from") == [8]
    new = toy_flow("--resume-from", f"{failed.run_id}@7")
    assert (only(new.data, "digest"), only(new.data, "history")) == straight
    assert only(new.data, "resumed_from") == [7]
    assert f"ToyFlow/{failed.run_id}/train" in new.output
    # what a resumed run was once told to continue is not what it continues: it has got further
    dying = ";".join(f"raise@step={step}" for step in range(8, 13))
    failed = toy_flow("--resume-from", f"{failed.run_id}@7", faults=dying, check=False)
    assert failed.returncode != 0
    resumed = toy_flow("--origin-run-id", failed.run_id, command="resume")
    assert (only(resumed.data, "digest"), only(resumed.data, "resumed_from")) == (straight[0], [11])
    # a bare `resume`, typed again, resumes the first run again: what the one in between has trained is not lost
    again = toy_flow("--origin-run-id", failed.run_id, command="resume")
    assert (only(again.data, "digest"), only(again.data, "resumed_from")) == (straight[0], [12])
    assert f"run {resumed.run_id}, resumed from run {failed.run_id} before, got further" in again.output
    wrong = toy_flow("--resume-from", "123", check=False)
    assert wrong.returncode != 0 and "run 123 of ToyFlow has no checkpoint of step 'train' that fits" in wrong.output


@pytest.mark.parametrize("damage", [b"", b"null", b"{}", b"[3]", b"type", b"attempt", b"step", b"pathspec"])
def test_a_record_that_is_none_is_mended_from_its_copy(monkeypatch, capsys, damage):
    """A flipped bit may leave JSON that is no record any more; that must not end every start."""
    from metaflow import Checkpoint

    task = f"Flipped{uuid.uuid4().hex}/1/train/7"
    root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], ".metaflow/mf.checkpoints/checkpoints/metadata")
    for attempt, steps in ((0, 4), (1, 8)):
        monkeypatch.setenv("METAFLOW_CHECKPOINT_UID", f"{task}/same/scope/{attempt}")
        toy.run(Checkpoint(), keep_last=3, steps=steps, config=None)
        if attempt == 0:
            (newest,) = (root / task).glob("*step-00000004*.metadata")
            before = newest.read_bytes()
            named = b'"' + damage + b'"'
            newest.write_bytes(before.replace(named, b'"~' + damage[1:] + b'"') if named in before else damage)
            assert newest.read_bytes() != before
    said = capsys.readouterr().out
    assert "was unreadable and is mended from its copy; resumed at step 4" in said, said


def test_a_damaged_record_of_the_run_to_continue_is_named(monkeypatch, capsys):
    """A kill may leave one; the checkpoint before it is continued."""
    from metaflow import Checkpoint

    root = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"], ".metaflow/mf.checkpoints/checkpoints/metadata")
    for run, source in ((1, None), (2, "1")):
        monkeypatch.setenv("METAFLOW_CHECKPOINT_UID", f"HalfRecorded/{run}/train/7/same/scope/0")
        with CheckpointManager(Checkpoint(), save_every=1, keep_last=3, resume_from=source) as checkpoints:
            state = toy.new_state()
            checkpoints.restore(state, toy.CONFIG)
            for _ in range(0 if source else 3):
                checkpoints.step(state)
        if source is None:
            (newest,) = (root / "HalfRecorded/1/train/7").glob("*step-00000003*.metadata")
            newest.write_text(newest.read_text()[:20])
    assert state.step == 2
    said = capsys.readouterr().out
    assert re.search("rejected the record .*step-00000003.* is unreadable; resumed at step 2", said), said


@pytest.mark.xdist_group("toy_resume")
def test_a_step_that_was_done_is_executed_again_from_its_beginning(straight):
    """``resume STEP`` asks for that, mostly with other code: nobody wants the weights of the old one."""
    done = toy_flow()
    again = toy_flow("train", "--origin-run-id", done.run_id, command="resume")
    assert only(again.data, "resumed_from") == [] and only(again.data, "digest") == straight[0]
    assert f"run {done.run_id} had done step 'train'" in again.output
    assert f"--resume-from {done.run_id}" in again.output


@pytest.mark.xdist_group("toy_foreach")
def test_each_branch_of_a_foreach_has_its_own(straight):
    run = toy_flow("--branches", "2", faults="kill@step=6")
    assert run.data.digest == [straight[0]] * 2
    assert all(steps in ([4], [5]) for steps in run.data.resumed_from), "SIGKILL may take the save in flight"
    again = toy_flow("--branches", "2", "--resume-from", run.run_id)
    assert again.data.resumed_from == [[12], [12]]
    sources = {event["source"] for event in again.events() if event["event"] == "resumed"}
    assert len(sources) == 2, f"both branches continued the same task: {sources}"


@pytest.mark.xdist_group("toy_foreach")
def test_the_card_of_checkpoint_is_refused(tmp_path):
    flow = [sys.executable, str(TOY), "run"]
    done = subprocess.run(flow, cwd=tmp_path, env={**os.environ, "TOY": "card"}, capture_output=True, text=True)
    assert done.returncode != 0 and 'load_policy="none", show_card=False' in done.stdout + done.stderr


def interrupted(cwd: Path, *command: str) -> tuple[int, str]:
    """The exit status and the output of a command, with Ctrl-C at step 4 of the slow case: all processes get SIGINT."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    output = ""
    for line in process.stdout:
        output += line
        if line.endswith("] step 4\n"):
            os.killpg(process.pid, signal.SIGINT)
    return process.wait(timeout=900), output


@pytest.mark.xdist_group("toy_keep")
def test_ctrl_c_saves_and_resume_continues():
    """G5: the terminal sends SIGINT to all processes; Metaflow kills the task five seconds later."""
    cwd = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
    _, output = interrupted(cwd, sys.executable, str(TOY), "run", "--case", "slow", "--run-id-file", "interrupted")
    stopped = re.search(r"stopped at step ([0-9]+): SIGINT was received", output)
    assert stopped and int(stopped[1]) >= 5, output[-3000:]
    resumed = toy_flow("--origin-run-id", (cwd / "interrupted").read_text().strip(), command="resume")
    assert only(resumed.data, "resumed_from") == [int(stopped[1])]


@pytest.mark.xdist_group("toy_keep")
def test_keep_running_goes_on_beyond_the_retries(straight):
    """Metaflow gives up after five attempts; keep-running resumes until it is done."""
    faults = ";".join(f"raise@step={step}" for step in (3, 5, 6, 8, 9, 11))
    cwd = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
    flow = [python_of(TOY), str(TOY), "run"]
    command = [sys.executable, "-m", "common", "keep-running", "--", *flow]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "FAULTS": faults}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "[keep-running] done after 2 runs" in done.stdout and "newest checkpoint of step 8" in done.stdout


@pytest.mark.xdist_group("toy_keep")
def test_keep_running_gives_up_when_nothing_gets_further():
    cwd = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
    flow = [python_of(TOY), str(TOY), "run", "--resume-from", "nothing"]
    done = subprocess.run(
        [sys.executable, "-m", "common", "keep-running", "--", *flow],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode != 0 and "three runs in a row" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "common", "keep-running", "ls"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "error: keep-running needs the command of a flow" in wrong.stderr


@pytest.mark.xdist_group("toy_keep")
@pytest.mark.parametrize("case", ["steps", "tasks"])
def test_keep_running_looks_at_every_task(case, tmp_path):
    """One task is far ahead, another gets on a little in each run: that is no reason to give up.

    And where the flow runs, and how, holds for its resumed runs, too.
    """
    flow = TOY.with_name("uneven_flow.py")
    options = ["--max-workers", "1", "--tag=nightly"]
    command = [python_of(flow), str(flow), "run", *options, "--case", case]
    done = subprocess.run(
        [sys.executable, "-m", "common", "keep-running", "--", *command],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "[keep-running] done after 5 runs" in done.stdout
    resumed = re.findall(r"\[keep-running\] .* resume --origin-run-id \d+ (.*) --runner-attribute-file", done.stdout)
    assert resumed == ["--max-workers 1 --tag=nightly"] * 4


@pytest.mark.xdist_group("toy_keep")
def test_keep_running_waits_for_what_ctrl_c_has_the_flow_save():
    """And it says how to go on; nothing is resumed by itself."""
    flow = [sys.executable, str(TOY), "run", "--case", "slow", "--max-workers", "2"]
    cwd = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"])
    status, output = interrupted(cwd, sys.executable, "-m", "common", "keep-running", "--", *flow)
    assert status == 130, output[-3000:]
    assert re.search(r"stopped at step [0-9]+: SIGINT was received", output), output[-3000:]
    last = output.splitlines()[-1]
    assert re.search(
        r"interrupted; to go on: keep-running -- .*toy_flow.py resume --origin-run-id \d+ --max-workers 2$", last
    )


@pytest.mark.xdist_group("toy_s3")
def test_everything_on_s3(straight, tmp_path):
    """The same on an object store (a server on loopback): kill, resume, retention, @model(load=)."""
    pytest.importorskip("moto.server", reason="moto is not installed")
    import socket

    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    env = {
        "METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "METAFLOW_DATASTORE_SYSROOT_S3": "s3://bucket/metaflow", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
                              aws_access_key_id="x", aws_secret_access_key="x")  # fmt: skip
        for _ in range(900):
            try:
                client.create_bucket(Bucket="bucket")
                break
            except Exception:
                time.sleep(0.2)
        run = toy_flow("--case", "s3", faults="kill@step=6;kill@save=2,attempt=1", env=env)
        keys = [item["Key"] for item in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
    finally:
        server.kill()
        server.wait()
    assert "resumed at step 5" in run.output and "attempt 2: found" in run.output, run.output[-3000:]
    kept = {key.split("/")[-2] for key in keys if key.endswith("/state.safetensors")}
    assert 2 <= len(kept) <= 4, f"retention on S3: {kept}"
    logs = [key for key in keys if "/events/" in key]
    assert len(logs) == 3, logs
