"""What is special about the gang: every rank dies at every step, whole nodes die, the number of ranks changes."""

import contextlib
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import preforked
import pytest
from gallery import REPO, Example, FlowRun, below, run_flow
from gang import Gangs

from common import torchrun
from common.data import photo_digits

EXAMPLE = Example(REPO / "cifar_distributed")
pytestmark = pytest.mark.xdist_group(EXAMPLE.name)
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def gangs():
    gangs = Gangs()
    yield gangs
    gangs.close()


@pytest.fixture(scope="module")
def module():
    """cifar_distributed/train.py, by a name that no other example's has."""
    spec = importlib.util.spec_from_file_location("cifar_distributed_train", EXAMPLE.path / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ranks(number: int, faults: str = "") -> dict:
    return {"ranks": number, "faults": faults}


def assert_same(straight: dict, answer: dict) -> None:
    assert answer["result"], answer["output"][-4000:]
    for key in ("weights_digest", "history", "state"):
        assert answer["result"][key] == straight["result"][key], f"{key} differs\n{answer['output'][-3000:]}"


# -------------------------------------------------------------------- exact


def test_every_rank_killed_at_every_step(gangs):
    straight, resumed = gangs.straight(2), set()
    for step in range(1, straight["result"]["history"][-1]["step"] + 1):
        for rank in (0, 1):
            answer = gangs.run(ranks(2, f"kill@step={step},rank={rank}"), ranks(2))
            expected = [1, 1]  # the other one is told so, and fails
            expected[rank] = KILLED
            assert answer["exits"] == [expected, [0, 0]], answer["output"][-3000:]
            assert_same(straight, answer)
            resumed.update(answer["result"]["resumed_from"])
    assert len(resumed) > 2


def test_nodes_die_as_a_whole_twice_in_one_run(gangs):
    """Two nodes of two ranks; each gets SIGKILL for its process group. Four ranks add in an order of their own."""
    answer = gangs.run(ranks(4, "kill@step=3,rank=2"), ranks(4, "kill@step=7,rank=1"), ranks(4), node=2)
    assert answer["exits"] == [[1, 1, KILLED, KILLED], [KILLED, KILLED, 1, 1], [0] * 4], answer["output"][-3000:]
    assert_same(gangs.straight(4), answer)
    resumed = answer["result"]["resumed_from"]  # SIGKILL may take the save in flight
    assert resumed and resumed == sorted(resumed) and set(resumed) <= {2, 4, 6}
    assert "RankLost: rank 3 of 4 lost the others after step" in answer["output"]
    line = re.search(
        r"\[gang\] each of 4 ranks continues .*/(step-\S+): step [246], epoch [01], (val_)?loss 2\.[0-9]+",
        answer["output"],
    )
    assert line, "the start line does not name what it continues"


@pytest.mark.parametrize("protection", ["other ranks' random states", "first backward pass"])
def test_without_a_protection_the_result_differs(gangs, protection):
    """Negative control. Buckets that are packed anew after a restart only matter when three or more numbers add up."""
    straight = gangs.run(ranks(4), sabotage=protection)
    answer = gangs.run(ranks(4, "kill@step=3,rank=1"), ranks(4), sabotage=protection)
    assert answer["result"]["weights_digest"] != straight["result"]["weights_digest"]


def test_one_rank_is_asked_to_stop_and_takes_the_others_along(gangs):
    answer = gangs.run(ranks(2, "term@step=3,rank=1"), ranks(2))
    assert answer["exits"] == [[1, 1], [0, 0]] and "another rank was asked to stop" in answer["output"]
    assert_same(gangs.straight(2), answer)
    trained = Counter(line for attempt in answer["ids"] for rank in attempt for line in rank)
    assert set(trained.values()) == {1}, "samples were trained twice although the state was saved"


def test_the_last_batch_of_an_epoch_has_fewer_images_than_there_are_ranks(gangs):
    """1,433 images, 358 in a step: in the last step of an epoch rank 1 has none, and takes part all the same."""
    config = {"batch_size": 358}
    straight = gangs.straight(2, **config)
    answer = gangs.run(ranks(2, "term@step=4"), ranks(2), config=config)
    assert answer["result"] and answer["result"]["resumed_from"] == [4], answer["output"][-3000:]
    assert_same(straight, answer)
    trained = Counter(line for attempt in answer["ids"] for rank in attempt for line in rank)
    assert len(trained) == 2 * 1433 and set(trained.values()) == {1}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_hangs(gangs, rank):
    answer = gangs.run(ranks(2, f"hang@step=3,rank={rank}"), ranks(2), timeout=4.0)
    assert answer["exits"] == [[1, 1], [0, 0]] and answer["seconds"][0] < 20
    assert "Timeout (0:00:04)!" in answer["output"] and "faults.py" in answer["output"], "it does not show where"
    assert_same(gangs.straight(2), answer)


def test_a_fault_for_a_rank_that_does_not_exist_is_an_error(gangs):
    answer = gangs.run(ranks(2, "kill@step=1,rank=2"))
    assert answer["exits"] == [[1, 1]] and "the ranks are 0 to 1" in answer["output"]


# -------------------------------------------------------------------- another number of ranks


def samples_of_steps(answer: dict, batch_size: int, samples: int) -> list[list[str]]:
    """Which samples were trained on in each global step, over all attempts."""
    steps = []
    for attempt in answer["ids"]:
        part = batch_size // len(attempt)
        queues = [list(lines) for lines in attempt]
        while any(queues):
            epoch = queues[0][0].split()[0]
            step = []
            for queue in queues:
                own = [line for line in queue[:part] if line.split()[0] == epoch]
                step += own
                del queue[: len(own)]
            steps.append(sorted(step))
    return steps


@pytest.mark.parametrize("sizes", [(2, 1, 2), (4, 2)])
def test_another_number_of_ranks_takes_over(gangs, sizes):
    """Each sample once in each epoch, the same global batches and schedule; the weights differ in the last bits."""
    config = {"dropout": 0.0, "batch_size": 360}
    faults = [f"term@step={3 * n}" for n in range(1, len(sizes))] + [""]
    straight = gangs.straight(sizes[0], **config)
    answer = gangs.run(*map(ranks, sizes, faults), config=config)
    assert answer["exits"][-1] == [0] * sizes[-1], answer["output"][-3000:]

    trained = Counter(line for attempt in answer["ids"] for rank in attempt for line in rank)
    count = len(trained) // 2
    assert set(trained.values()) == {1} and set(trained) == {f"{e} {i}" for e in (0, 1) for i in range(count)}
    assert samples_of_steps(answer, 360, count) == samples_of_steps(straight, 360, count)

    history, reference = answer["result"]["history"], straight["result"]["history"]
    assert [list(record) for record in history] == [list(record) for record in reference]
    for record, other in zip(history, reference, strict=True):
        assert record == pytest.approx(other, rel=1e-3, abs=0.01)
    assert f"ranks: {sizes[0]} -> {sizes[1]}; the result may differ in the last bits" in answer["output"]

    from safetensors.numpy import load_file

    weights, others = (load_file(result["result"]["model"]) for result in (answer, straight))
    assert max(np.abs(weights[name] - others[name]).max() for name in weights) < 1e-3


def test_another_number_of_ranks_is_refused_when_it_must_be_exact(gangs):
    answer = gangs.run(ranks(2, "term@step=2"), ranks(1), keep={"exact": True})
    assert answer["exits"][1] == [1] and "ranks: 2 -> 1. With --exact that is refused" in answer["output"]


def test_validation_counts_each_image_once(gangs):
    """358 images on 4 ranks: with padding it would be 360."""
    images = len(photo_digits(1).val_labels)
    assert images % 4, "choose another number of ranks"
    for record in gangs.straight(4)["result"]["history"]:
        if "val_accuracy" in record:
            right = record["val_accuracy"] * images
            assert right == pytest.approx(round(right), abs=1e-6)


# -------------------------------------------------------------------- GPUs, of which there is none here


@pytest.mark.parametrize(
    ("places", "rank", "device"),
    [
        ([("laptop", 0)], 0, "cpu"),
        ([("laptop", 1)], 0, "cuda:0"),  # python train.py, where nothing sets LOCAL_RANK
        ([("laptop", 1)] * 2, 1, "cpu"),  # two nodes on one machine: NCCL refuses two ranks on one GPU
        ([("laptop", 2)] * 2, 1, "cuda:1"),  # the same with two GPUs, where LOCAL_RANK is 0 in both
        ([("a", 2), ("a", 2), ("b", 2), ("b", 2)], 3, "cuda:1"),
        ([("a", 1), ("b", 1), ("b", 1)], 0, "cpu"),  # all or none
    ],
)
def test_each_rank_has_a_gpu_of_its_own_or_all_have_none(module, monkeypatch, capsys, places, rank, device):
    def all_gather_object(answers: list, mine: tuple) -> None:
        assert mine == places[rank]
        answers[:] = places

    chosen = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(module.socket, "gethostname", lambda: places[rank][0])
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: places[rank][1] > 0)
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: places[rank][1])
    monkeypatch.setattr(module.torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(module.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: len(places))
    monkeypatch.setattr(module.dist, "all_gather_object", all_gather_object)
    assert str(module.choose_device()) == device
    assert chosen == ([] if device == "cpu" else [device])
    if rank == 0 and device == "cpu" and places[0][1]:
        assert f"{len(places)} ranks have no GPU each: they train on the CPU" in capsys.readouterr().out


# -------------------------------------------------------------------- whole flows


def processes(*words: str) -> dict[int, str]:
    """The running processes whose command line or environment has all the words, with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            text = line + (path / "environ").read_bytes().decode(errors="replace")
            if line and all(word in text for word in words):
                found[int(path.name)] = line
    return found


LATE = """
import os, sys, time
words = " ".join(sys.orig_argv)
if "torch.distributed.run" in words and "--node_rank 1" in words and os.environ["METAFLOW_CHECKPOINT_UID"][-2:] == "/0":
    print("node 1 is late", file=sys.stderr, flush=True)
    time.sleep(600)
"""  # what Python imports at its start: in attempt 0 the second node's torchrun starts too late


class WatchedRun:
    """``flow.py run`` with something done to it when a line appears."""

    def __init__(self, *arguments: str, faults: str, startup: str, when: dict[str, object]) -> None:
        self.cwd = Path(tempfile.mkdtemp(dir=os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]))
        (self.cwd / "startup").mkdir()
        (self.cwd / "startup" / "sitecustomize.py").write_text(startup)
        command = [sys.executable, str(EXAMPLE.path / "flow.py"), "run", "--run-id-file", "run_id", *arguments]
        flow = subprocess.Popen(
            command, cwd=self.cwd, env={**os.environ, "FAULTS": faults, "PYTHONPATH": str(self.cwd / "startup")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        watchdog = threading.Timer(800, flow.kill)
        watchdog.start()
        self.output, self.attempts, waiting = "", [""], dict(when)
        for line in flow.stdout:
            self.output += line
            if "Task is starting (retry)" in line:
                self.attempts.append("")
            self.attempts[-1] += line
            for key in [key for key in waiting if key == (len(self.attempts) - 1, *key[1:]) and key[1] in line]:
                waiting.pop(key)(self)
        watchdog.cancel()
        assert flow.wait() == 0, self.output[-6000:]
        assert not waiting, f"these lines never came: {list(waiting)}"

    @property
    def run_id(self) -> str:
        return (self.cwd / "run_id").read_text().strip()

    def kill_node(self, number: int) -> None:
        (pid,) = processes(self.run_id, f"_node_{number} ", "flow.py")
        os.kill(pid, signal.SIGKILL)

    def has_a_card(self) -> None:
        """While the ranks train, or one hangs, the card of the control task shows how far they got."""
        root, deadline, seen = Path(os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]), time.monotonic() + 60, ""
        while not ("attempt 2" in seen and "loss" in seen):
            assert time.monotonic() < deadline, f"no card while the gang trains: {seen[:2000]}"
            time.sleep(0.2)
            for path in below(root, f"{self.run_id}/steps/train/**/runtime/blank-training-*.data.json"):
                with contextlib.suppress(OSError):
                    seen = path.read_text()

    def no_orphans(self) -> None:
        """When a retry starts, no process of an earlier attempt is left, but for Metaflow's that still draws a card."""
        deadline, attempt = time.monotonic() + 5, len(self.attempts) - 1
        while orphans := [
            pid
            for pid, line in processes(self.run_id, "METAFLOW_CHECKPOINT_UID").items()
            if attempt_of(pid) != attempt and " card create " not in line
        ]:
            assert time.monotonic() < deadline, [Path(f"/proc/{pid}/cmdline").read_text() for pid in orphans]
            time.sleep(0.2)


def options_of(config: dict[str, object]) -> list[str]:
    """On the command line of flow.py."""
    return [word for name, value in config.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def attempt_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):  # it has just ended
        return int(re.search(r"METAFLOW_CHECKPOINT_UID=[^\0]*/([0-9]+)\0", Path(f"/proc/{pid}/environ").read_text())[1])


def test_a_gang_fails_in_every_way_and_ends_the_same(gangs):
    """In attempt 0 a node starts late, 1 finds its port taken, in 2 a rank hangs, in 3 a whole node is killed.

    Each says so and is retried, and the card of the last one has it all.
    """
    config = {"epochs": 4, "batch_size": 240, "backgrounds": 4, "width": 4, "dropout": 0.2}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1] - 1  # a retry takes the next one
        run = WatchedRun(
            *options_of(config), "--timeout", "30", "--master-port", str(port), "--save-every", "5",
            faults="hang@step=30,attempt=2,rank=1", startup=LATE,
            when={(1, "the port where the ranks meet is taken"): WatchedRun.no_orphans,
                  (2, "[faults] hang@step=30"): WatchedRun.has_a_card,
                  (3, "resumed at step"): WatchedRun.no_orphans, (3, "epoch  2/4"): lambda run: run.kill_node(1),
                  (4, "resumed at step"): WatchedRun.no_orphans},
        )  # fmt: skip
    assert len(run.attempts) == 5, run.output[-4000:]
    assert "node 1 is late" in run.attempts[0], "it was not late at all"
    assert "node 0 of 2, attempt 0: not all nodes started in time; --timeout says how long to wait" in run.attempts[0]
    assert "node 0 of 2, attempt 1: the port where the ranks meet is taken" in run.attempts[1]
    assert "a rank made no step within --timeout; the traceback above shows where it hung" in run.attempts[2]
    assert "node 0 of 2, attempt 3: a rank lost the others" in run.attempts[3]
    task = re.search(r"\[gang\] each of 2 ranks continues (\S+) attempt ([0-9]) (\S+): step ([0-9]+),", run.attempts[4])
    assert task[1].startswith(f"CifarDistributedFlow/{run.run_id}/train/") and task[2] in "23"

    flow = FlowRun(0, run.output, EXAMPLE.flow_name, run.run_id, run.cwd)
    straight = gangs.straight(2, **config)["result"]  # the same training without Metaflow
    assert flow.data.weights_digest == straight["weights_digest"] and flow.data.history == straight["history"]
    assert len(flow.data.resumed_from) == 2 and flow.data.resumed_from[-1] == int(task[4])
    right = flow.data.accuracy * len(photo_digits(1).test_labels)
    assert right == pytest.approx(round(right), abs=1e-6), "the classes differ in size, and each image counts once"
    assert not processes(run.run_id)

    shown = re.search(r"the card of the whole training: --hash (\w+)", run.attempts[4])
    card = flow.card_data("train", f"blank-training-{shown[1]}*")
    for words in ("interrupted twice", "attempt 2: killed", "attempt 3: resumed at", "rank lost at", "val_loss"):
        assert words in card, words
    assert not [card for card in flow.cards("train", "blank-training-*") if "_node_1" in str(card)], "an empty one"


def run_killed_at(step: int, *arguments: str) -> str:
    """``flow.py run``, whose runner gets SIGKILL while rank 0 hangs at ``step``. Returns the run's id."""
    fault = f"hang@step={step}"
    cwd = Path(tempfile.mkdtemp(dir=os.environ["METAFLOW_DATASTORE_SYSROOT_LOCAL"]))
    script = EXAMPLE.path / "flow.py"
    command = [preforked.python_of(script), str(script), "run", "--run-id-file", "run_id", *arguments]
    env = {**os.environ, "FAULTS": fault}
    flow = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = ""
    for line in flow.stdout:
        output += line
        if f"[faults] {fault}" in line:
            flow.kill()
    assert flow.wait(timeout=900) == KILLED, output[-3000:]
    return (cwd / "run_id").read_text().strip()


def test_a_run_whose_runner_was_killed_is_resumed(gangs):
    """Metaflow's ``resume`` continues it, and not the run that it had continued itself."""
    config = {"epochs": 4, "batch_size": 240, "backgrounds": 1, "width": 4, "dropout": 0.2}
    arguments = [*options_of(config), "--save-every", "2"]
    first = run_killed_at(9, *arguments)
    second = run_killed_at(21, *arguments, "--resume-from", first)
    resumed = run_flow(EXAMPLE, "--origin-run-id", second, command="resume")
    assert f"of CifarDistributedFlow/{second}/train/" in resumed.output, resumed.output[-3000:]
    straight = gangs.straight(2, **config)["result"]
    assert resumed.data.weights_digest == straight["weights_digest"] and resumed.data.history == straight["history"]


@pytest.mark.slow  # two nodes do the same in the ordinary suite, at the size of a test
def test_four_nodes_learn():
    """The documented command, in full: four nodes, the default parameters."""
    run = run_flow(EXAMPLE, "--cluster-size", "4", timeout=900)
    assert run.data.accuracy >= 0.9 and len(run.data.accuracies) == 10
    assert len(run.data.images_per_second) == 4 and min(run.data.images_per_second) > 0
    assert not any("second" in key for record in run.data.history for key in record), "clock times in the history"
    assert "accuracy per class" in run.card_data("test")
    assert "test accuracy 0: " in run.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "65"], "a global batch of 65 cannot be divided among 2 ranks"),
        (["--model", "resnet9"], "model is 'resnet9': choose one of small, resnet18, resnet50"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_written(arguments, message):
    run = run_flow(EXAMPLE, *arguments, check=False)
    assert run.returncode != 0 and message in run.output and run.events() == []


# -------------------------------------------------------------------- torchrun


def launch(*arguments: str, program: str = "", timeout: float = 900) -> str:
    """What torchrun writes on standard error."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "program.py")
        script.write_text(program)
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, str(script)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout).stderr


def test_what_ends_a_rank_is_said_in_a_sentence():
    """The real torchrun's words for a SIGKILL, and for a node that starts too late."""
    killed = launch("--nproc_per_node=2", program="import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)")
    assert torchrun.explanation(killed).startswith("rank 1 was killed by SIGKILL (exit 137): out of memory"), killed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    late = launch(
        "--nnodes=2", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={port}", "--rdzv_conf=timeout=2"
    )
    assert torchrun.explanation(late).startswith("not all nodes started in time"), late
    assert torchrun.explanation("ValueError: no") == "a rank ended with an error, see above"


MENDED = """
import os, metaflow
from importlib import metadata
import metaflow_extensions.torchrun.plugins.torchrun_libs.torchrun_decorator as library
from common import torchrun
shipped, real = library.TorchrunDecoratorParallel.task_pre_step, metadata.version
for runtime, version in [("kubernetes", ""), ("aws-batch", ""), ("local", "0.2.3"), ("local", "")]:
    os.environ["METAFLOW_RUNTIME_ENVIRONMENT"] = runtime
    metadata.version = lambda name: version or real(name)
    torchrun.mend()
    print(library.TorchrunDecoratorParallel.task_pre_step is not shipped, end=" ")
"""


def test_torchrun_is_mended_only_where_it_must_be():
    """Not on Kubernetes, not on Batch, not in a later version."""
    done = subprocess.run([sys.executable, "-c", MENDED], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "False", "True"], done.stderr[-2000:]


def test_torchrun_still_needs_to_be_mended(tmp_path):
    """Contract: when this fails, @torchrun runs on the local runtime as shipped, and ``torchrun.mend`` can go."""
    flow = tmp_path / "flow.py"
    flow.write_text(
        "from metaflow import FlowSpec, step, torchrun, current\n"
        "class F(FlowSpec):\n"
        "    @step\n    def start(self): self.next(self.train, num_parallel=1)\n"
        "    @torchrun\n    @step\n    def train(self): self.next(self.join)\n"
        "    @step\n    def join(self, inputs): self.next(self.end)\n"
        "    @step\n    def end(self): pass\n"
        "if __name__ == '__main__': F()\n"
    )
    done = subprocess.run([sys.executable, str(flow), "run"], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    assert done.returncode and "has no attribute 'input_paths'" in output, output[-3000:]
    assert metadata.version("metaflow-torchrun").startswith("0.2.2"), "a new version: look at common/torchrun.py again"


# -------------------------------------------------------------------- data and models


def test_photo_digits():
    one, four = photo_digits(1), photo_digits(4)
    assert four.train_images.shape == (4 * len(one.train_labels), 32, 32, 3) and four.train_images.dtype == np.uint8
    assert len(one.train_labels) + (len(one.val_labels) + len(one.test_labels)) // 2 == 1797
    assert one.fingerprint == photo_digits(1).fingerprint != four.fingerprint
    assert np.array_equal(one.test_images, four.test_images), "the test does not depend on the training's size"
    for part in (one.train_labels, one.val_labels, one.test_labels):
        assert set(part) == set(range(10)) and np.bincount(part).min() > 0.08 * len(part)
    copies = {image.tobytes() for image in four.train_images}
    assert len(copies) == len(four.train_images), "each copy has a photograph of its own behind it"


CIFAR = """
import sys; sys.path.insert(0, {example!r})
import hashlib, pickle, numpy as np, torch
from pathlib import Path
from torchvision.datasets import CIFAR10
folder = Path("data", CIFAR10.base_folder); folder.mkdir(parents=True)
random = np.random.default_rng(0)
def write(name, content):
    (folder / name).write_bytes(pickle.dumps(content))
    return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
def batch(name):
    return write(name, {{"data": random.integers(0, 256, (40, 3072), dtype=np.uint8), "labels": [*range(10)] * 4}})
CIFAR10.train_list = [batch(name) for name, _ in CIFAR10.train_list]
CIFAR10.test_list = [batch(name) for name, _ in CIFAR10.test_list]
name, md5 = write(CIFAR10.meta["filename"], {{"label_names": list("0123456789")}})
CIFAR10.meta = {{**CIFAR10.meta, "md5": md5}}
import train
config = train.TrainConfig(dataset="cifar10", model="resnet18")
data = train.load_data(config)
print(data.train_images.shape, data.val_images.shape, data.test_images.shape, np.bincount(data.val_labels))
assert data.fingerprint == train.load_data(config).fingerprint
images = train.AugmentedImages(data.train_images, data.train_labels, config)
batch = torch.stack([images[n][0] for n in range(4)])
assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in train.build_model(config).modules())
print(tuple(train.build_model(config)(batch).shape))
"""


def test_cifar10_and_resnet_are_one_parameter_away(tmp_path):
    """Through torchvision's own loader and model (with a miniature of the files, as there is no network here)."""
    code = CIFAR.format(example=str(EXAMPLE.path))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    shapes = "(180, 32, 32, 3) (20, 32, 32, 3) (40, 32, 32, 3) [2 2 2 2 2 2 2 2 2 2]"
    assert done.stdout.splitlines() == [shapes, "(4, 10)"], done.stderr[-3000:]
