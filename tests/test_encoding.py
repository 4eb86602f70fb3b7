"""The encoding is exact, and refuses what it cannot say exactly."""

import collections
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import common.snapshot
from common import CheckpointManager, TrainState
from common.encoding import Array, History, decode, encode, plain_json
from common.errors import CheckpointError, InvalidCheckpoint
from common.snapshot import Snapshot, StateFile


class CheckpointedTree(TrainState):
    """A state that is one tree."""

    def __init__(self, tree):
        super().__init__()
        self.tree = tree

    def state_dict(self):
        return {"tree": self.tree}


def through_a_file(tree, directory):
    encoded, arrays = encode(tree)
    snapshot = Snapshot()
    snapshot.take(arrays)
    path = directory / "state.safetensors"
    path.unlink(missing_ok=True)
    snapshot.write(path)
    stored = StateFile(path)
    state = decode(json.loads(json.dumps(encoded, allow_nan=False)), stored.tensor, stored.array)
    assert stored.read() == xxhash.xxh3_128(path.read_bytes()).hexdigest()
    return state


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
arrays = st.sampled_from(["bool", "uint8", "int16", "int64", "float16", "float32", "float64"]).flatmap(
    lambda name: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: np.ones(shape, name))
)
keys = st.text(max_size=4) | st.integers() | st.tuples(st.integers(), st.text(max_size=2))
trees = st.recursive(
    scalars | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(st.just("$tuple") | st.just("$x"), inner, max_size=2)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_any_tree_comes_back_exactly(tmp_path_factory, tree):
    assert same(tree, through_a_file(tree, tmp_path_factory.mktemp("tree")))


def test_what_optimizers_and_schedulers_hold(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not among this example's requirements")
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 2).t()}, 1: {}},
        "milestones": collections.Counter({3: 1, 5: 2}),
        "betas": (0.9, 0.999),
        "best": -math.inf,
        "half": torch.randn(5).to(torch.bfloat16),
        "scalar": np.float32(0.1),
        "empty": torch.zeros(0, 3),
        "size": torch.Size([2, 3]),
    }
    back = through_a_file(tree, tmp_path)
    assert back["state"].keys() == tree["state"].keys()
    assert torch.equal(back["state"][0]["exp_avg"], tree["state"][0]["exp_avg"])
    assert back["half"].dtype == torch.bfloat16 and torch.equal(back["half"], tree["half"])
    assert type(back["milestones"]) is collections.Counter and back["milestones"] == tree["milestones"]
    assert back["best"] == -math.inf and back["betas"] == (0.9, 0.999) and back["size"] == (2, 3)
    assert type(back["scalar"]) is np.float32 and back["scalar"] == tree["scalar"]
    assert back["empty"].shape == (0, 3)


def test_any_safetensors_reader_opens_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tree = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "odd": np.ones(3, bool),
        "b": {"c": np.ones(2, np.float32)},
    }
    through_a_file(tree, tmp_path)
    loaded = safetensors.load_file(tmp_path / "state.safetensors")
    assert loaded.keys() == {"a", "odd", "b/c"} and (loaded["a"] == tree["a"]).all()


def test_the_snapshot_is_of_one_point_in_time(tmp_path):
    """G6: what happens to an array after take() is not in the file, also when the buffer is used again."""
    value = np.zeros(1000, np.float32)
    snapshot = Snapshot()
    for number in range(3):
        value[:] = number
        _, arrays_of = encode({"value": value})
        snapshot.take(arrays_of)
        value[:] = -1
        path = tmp_path / f"{number}.safetensors"
        snapshot.write(path)
        stored = StateFile(path)
        read = stored.array("value")
        stored.read()
        assert (read == number).all()


def tensors_of_every_kind(torch, device):
    base = torch.arange(24, dtype=torch.float32, device=device).reshape(4, 6)
    tied = torch.randn(3, 3, device=device)
    return {
        "plain": torch.randn(5, 7, device=device),
        "view": base[1:3],
        "transposed": base.t(),
        "every second": base[:, ::2],
        "tied one": tied,
        "tied two": tied,
        "parameter": torch.nn.Parameter(torch.randn(4, device=device)),
        "bf16": torch.randn(5, device=device).to(torch.bfloat16),
        "bool": torch.tensor([True, False, True], device=device),
        "complex, conjugated": torch.randn(3, dtype=torch.complex64, device=device).conj(),
        "0-d": torch.tensor(3.5, device=device),
        "empty": torch.zeros(0, 3, device=device),
        "int64": torch.arange(3, device=device),
    }


def test_tensors_of_every_kind_may_change_right_after_save(tmp_path):
    """G6: save() returns when the state is copied; what an optimizer does in place a moment later is not in it."""
    pytest.importorskip("torch", reason="torch is not among this example's requirements")
    save_and_change(tmp_path, "cpu")


def test_the_same_on_a_gpu(tmp_path):
    """In a process of its own, because conftest.py hides the GPUs from all others."""
    smi = shutil.which("nvidia-smi")
    if smi is None or "GPU 0" not in subprocess.run([smi, "-L"], capture_output=True, text=True).stdout:
        pytest.skip("no GPU here")
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    code = "import sys; import pathlib, test_encoding as t; t.save_and_change(pathlib.Path(sys.argv[1]), 'cuda')"
    line = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(line, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_way_from_a_gpu_with_stand_ins_for_its_streams(tmp_path, monkeypatch):
    """What is copied to where, and that the step in progress is waited for before, and the copies after."""
    torch = pytest.importorskip("torch", reason="torch is not among this example's requirements")
    log = []

    class Stream:
        def __init__(self, device):
            log.append(f"stream for {device}")

        def wait_stream(self, current):
            log.append(f"wait for {current}")

        def synchronize(self):
            log.append("synchronize")

    @contextlib.contextmanager
    def queue(stream):
        yield
        log.append("queued")

    tree = tensors_of_every_kind(torch, "cpu")
    expected = {name: tensor.detach().clone().resolve_conj() for name, tensor in tree.items()}
    arrays = encode(tree)[1]
    monkeypatch.setattr(Array, "on_gpu", True)
    for name, stand_in in {"Stream": Stream, "stream": queue, "current_stream": lambda device: "the step",
                           "is_initialized": lambda: True}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(
        common.snapshot, "_pin", lambda buffer: log.append("pinned") or (lambda: log.append("unpinned"))
    )
    snapshot = Snapshot()
    snapshot.reserve(10, pinned=True)
    for number in range(2):
        log.clear()
        snapshot.take(arrays)
        larger = ["unpinned", "pinned"] if number == 0 else []
        before = [*larger, "stream for cpu", "wait for the step"]
        assert log == [*before, *["queued"] * len(tree), "synchronize"]
        with torch.no_grad():
            for tensor in tree.values():
                tensor.fill_(1) if tensor.is_conj() else tensor.zero_()
        snapshot.write(tmp_path / f"{number}.safetensors")
        stored = StateFile(tmp_path / f"{number}.safetensors")
        found = {name: stored.tensor(name) for name in tree}
        stored.read()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        with torch.no_grad():
            for name, tensor in tree.items():
                tensor.copy_(expected[name])


def save_and_change(directory, device):
    """Save tensors of every kind on a device, change them at once, and compare what was saved."""
    import torch

    tree = tensors_of_every_kind(torch, device)
    expected = {name: tensor.detach().clone().resolve_conj().cpu() for name, tensor in tree.items()}
    state = CheckpointedTree(tree)
    with CheckpointManager(directory) as checkpoints:
        checkpoints.restore(state)
        for step in range(1, 4):  # the buffer is used again
            state.step = step
            checkpoints.save(state)
            with torch.no_grad():
                for tensor in tree.values():
                    tensor.fill_(1) if tensor.is_conj() else tensor.zero_()
            saved = checkpoints.load_state(checkpoints.latest)["tree"]
            assert saved.keys() == expected.keys()
            for name, tensor in saved.items():
                assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
                assert torch.equal(tensor, expected[name]), name
            with torch.no_grad():
                for name, tensor in tree.items():
                    tensor.copy_(expected[name])


def test_a_meta_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not among this example's requirements")
    with pytest.raises(CheckpointError, match="cannot save tree/lazy: .* on meta"):
        encode({"tree": {"lazy": torch.zeros(3, device="meta")}})


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_refused_or_hashes_differently(tmp_path_factory, data):
    """Before the hash is known the header is read: whatever stands in it, nothing but InvalidCheckpoint comes of it."""
    whole = _small_file(tmp_path_factory)
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= data.draw(st.integers(1, 255))
    length = data.draw(st.sampled_from([len(whole), len(whole) - 1, len(whole) // 2, 7, 0]))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged[:length])
    try:
        stored = StateFile(path)
        for name in ("a", "b/c", "empty"):
            stored.array(name)
        digest = stored.read()
    except InvalidCheckpoint:
        return
    assert digest != xxhash.xxh3_128(whole).hexdigest()


def _small_file(factory) -> bytes:
    path = factory.getbasetemp() / "whole.safetensors"
    if not path.exists():
        snapshot = Snapshot()
        tree = {"a": np.arange(3.0), "b": {"c": np.ones(2, np.float32)}, "empty": np.ones((0, 4), np.int8)}
        snapshot.take(encode(tree)[1])
        snapshot.write(path)
    return path.read_bytes()


def test_what_numpy_has_beside_plain_arrays(tmp_path):
    """The order in memory decides in which order a sum is made; names of classes are numpy's own strings."""
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    tree = {"f": fortran, "labels": list(np.unique(["cat", "dog"])), "raw": np.bytes_(b"x"), "buffer": bytearray(b"y")}
    back = through_a_file(tree, tmp_path)
    assert same(back, tree) and back["f"].flags.f_contiguous and not back["f"].flags.c_contiguous


def test_another_default_device(tmp_path):
    torch = pytest.importorskip("torch")
    torch.set_default_device("meta")  # as people write "cuda"
    try:
        assert through_a_file({"x": torch.ones(3, device="cpu")}, tmp_path)["x"].tolist() == [1, 1, 1]
    finally:
        torch.set_default_device(None)


def test_a_tensor_without_memory_is_refused():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)  # as FSDP does with what it has sharded; a DTensor has none, either
    with pytest.raises(CheckpointError, match="cannot save deep/er: a Tensor that has no memory of its own"):
        encode({"deep": {"er": tensor}})


@pytest.mark.parametrize(
    "value",
    [
        object(), {1, 2}, lambda: 0, np.array([object()]), {"deep": [{"er": object()}]}, np.arange(3, dtype=">f4"),
        np.array(["a"]), np.ma.masked_array([1, 2]), np.datetime64("2026"), np.timedelta64(3, "s"), np.longdouble(1),
        collections.defaultdict(int),
    ],
)  # fmt: skip
def test_what_has_no_exact_form_is_refused_by_path(value):
    with pytest.raises(CheckpointError, match="cannot save part") as error:
        encode({"part": value})
    if type(value) is dict:
        assert "part/deep/0/er" in str(error.value)


def test_names_that_collide_stay_apart(tmp_path):
    tree = {"a": {"b": np.ones(1)}, "a/b": np.zeros(2)}
    assert same(tree, through_a_file(tree, tmp_path))


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, np.float32("nan"), object(), {"x": math.nan}, {1: 2}, [math.inf]]
)
def test_metrics_are_plain_and_finite(value):
    with pytest.raises(CheckpointError, match="metric"):
        plain_json(value, "metric 'loss'")


def test_numpy_scalars_become_numbers():
    assert plain_json({"a": np.float64(0.5), "b": np.int64(3), "c": np.array(2.0)}, "m") == {"a": 0.5, "b": 3, "c": 2.0}


def test_history_is_copied_not_shared():
    history = History([{"step": 1}])
    encoded, _ = encode({"history": history})
    history.append({"step": 2})
    assert encoded["history"] == {"$history": [{"step": 1}]}
