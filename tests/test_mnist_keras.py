"""What is special about mnist_keras/ and common.keras: what fit would forget, and what is refused."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gallery
import numpy as np
import pytest

from common import CheckpointError, CheckpointManager, FaultInjected, StopRequested, weights_digest

pytestmark = pytest.mark.xdist_group("mnist_keras")

STEPS, EPOCHS = 4, 4


@pytest.fixture(scope="module")
def keras() -> Iterator[ModuleType]:
    """Imported late: it takes seconds, and every worker collects this file."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    return pytest.importorskip("keras")


@pytest.fixture(scope="module")
def digits(keras: ModuleType) -> ModuleType:
    """mnist_keras/train.py, by a name that no other example's has."""
    spec = importlib.util.spec_from_file_location("mnist_keras_train", gallery.REPO / "mnist_keras" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------ a model of four layers, four epochs of four steps


def new_model(keras: ModuleType, **compile_options: Any) -> Any:
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"], **compile_options)
    return model


def samples() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(STEPS * 8, 6)).astype("float32"), random.integers(3, size=STEPS * 8)


def dataset(steps: Any) -> Any:
    import tensorflow as tf

    x, y = map(tf.constant, samples())
    position = tf.TensorSpec((), tf.int64)

    def load_batch(epoch: Any, step: Any) -> Any:
        rows = tf.random.experimental.index_shuffle(step * 8 + tf.range(8, dtype=tf.int64), tf.stack([1, epoch]), 31)
        return tf.gather(x, rows), tf.gather(y, rows)

    return tf.data.Dataset.from_generator(steps, output_signature=(position, position)).map(load_batch).prefetch(2)


def patience(keras: ModuleType) -> list[Any]:
    return [
        keras.callbacks.ReduceLROnPlateau("accuracy", patience=1, min_delta=0.5),
        keras.callbacks.EarlyStopping("accuracy", patience=2, min_delta=0.5, restore_best_weights=True),
    ]


def attempt(keras: ModuleType, directory: Path, callbacks: Any = (), **fit_options: Any) -> dict[str, Any]:
    """One attempt; all of them in this process, which makes Keras count its names on from model to model."""
    from common.keras import CheckpointCallback, named_arrays

    keras.utils.set_random_seed(0)
    with CheckpointManager(directory, save_every=3, keep_best=("loss", "min")) as checkpoints:
        checkpoint = CheckpointCallback(checkpoints, {"model": 1}, callbacks)
        model = new_model(keras)
        options = {"steps_per_epoch": STEPS, "epochs": EPOCHS, "verbose": 0, "shuffle": False, **fit_options}
        model.fit(dataset(checkpoint.steps), callbacks=[checkpoint], **options)
        return {
            "weights": weights_digest(named_arrays(model.weights)),
            "history": checkpoint.history,
            "resumed_from": checkpoints.resumed_from,
        }


def interrupted(keras: ModuleType, monkeypatch: Any, directory: Path, step: int, **options: Any) -> dict[str, Any]:
    """Ended by an error at ``step``, then started again with a new model."""
    carried = options.pop("carried", lambda keras: ())
    monkeypatch.setenv("FAULTS", f"raise@step={step}")
    with pytest.raises(FaultInjected):
        attempt(keras, directory, carried(keras), **options)
    return attempt(keras, directory, carried(keras), **options)


@pytest.fixture(scope="module")
def straight(keras: ModuleType, tmp_path_factory: Any) -> dict[str, Any]:
    return attempt(keras, tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("step", [5, 8, 12, 15])  # resumes after steps 3, 6, 9 and 12, an epoch's last without its end
def test_ends_the_same(keras: Any, straight: Any, monkeypatch: Any, tmp_path: Path, step: int) -> None:
    again = interrupted(keras, monkeypatch, tmp_path, step)
    assert again.pop("resumed_from") == [(step - 1) // 3 * 3]
    assert again == {key: straight[key] for key in again}


def test_patience_continues(keras: Any, monkeypatch: Any, tmp_path: Path) -> None:
    early = attempt(keras, tmp_path / "straight", patience(keras))
    assert early["history"][-1]["epoch"] == 3 < EPOCHS, "EarlyStopping did not end the training"
    assert early["history"][-1]["learning_rate"] < 0.05, "ReduceLROnPlateau did nothing"
    again = interrupted(keras, monkeypatch, tmp_path / "again", 11, carried=patience)
    assert again["resumed_from"] == [9]
    assert (again["weights"], again["history"]) == (early["weights"], early["history"])
    ended = attempt(keras, tmp_path / "again", patience(keras))
    assert ended["history"] == early["history"], "a training that was stopped early went on"


# ------------------------------------------------------------ negative controls: each protection is needed


def forget_seeds(adapter: Any, monkeypatch: Any) -> None:
    original = adapter._Variables.load_state_dict

    def load(self: Any, saved: Any) -> None:
        mine = self.state_dict()
        original(self, {name: mine[name] if "seed_generator" in name else value for name, value in saved.items()})

    monkeypatch.setattr(adapter._Variables, "load_state_dict", load)


def forget_optimizer(adapter: Any, monkeypatch: Any) -> None:
    original = adapter._Variables.load_state_dict

    def load(self: Any, saved: Any) -> None:
        original(self, {name: np.zeros_like(value) if "momentum" in name else value for name, value in saved.items()})

    monkeypatch.setattr(adapter._Variables, "load_state_dict", load)


def forget_metrics(adapter: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(adapter._Metrics, "load_state_dict", lambda self, saved: setattr(self, "_kept", saved))


def forget_memory(adapter: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(adapter._Memory, "load_state_dict", lambda self, saved: None)


@pytest.mark.parametrize(
    ("forget", "differs"),
    [(forget_seeds, "weights"), (forget_optimizer, "weights"), (forget_metrics, "history")],
)
def test_it_would_differ(
    keras: Any, straight: Any, monkeypatch: Any, tmp_path: Path, forget: Any, differs: str
) -> None:
    import common.keras

    forget(common.keras, monkeypatch)
    again = interrupted(keras, monkeypatch, tmp_path, 8)
    assert again["resumed_from"] == [6]
    assert again[differs] != straight[differs]


def test_without_memory_it_trains_too_long(keras: Any, monkeypatch: Any, tmp_path: Path) -> None:
    import common.keras

    forget_memory(common.keras, monkeypatch)
    again = interrupted(keras, monkeypatch, tmp_path, 11, carried=patience)
    assert again["history"][-1]["epoch"] > 3


def test_backup_and_restore_is_not_exact(keras: Any, tmp_path: Path) -> None:
    """Why there is an adapter: Keras's own callback begins the epoch anew with the weights of its middle."""
    trained: list[int] = []

    class Steps(keras.callbacks.Callback):
        die_at = 7

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            trained.append(int(self.model.optimizer.iterations))
            if len(trained) == self.die_at:
                raise KeyboardInterrupt

    def fit() -> None:
        keras.utils.set_random_seed(0)
        x, y = samples()
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=3, delete_checkpoint=False)
        new_model(keras).fit(x, y, batch_size=8, epochs=EPOCHS, verbose=0, shuffle=False, callbacks=[backup, Steps()])

    with pytest.raises(KeyboardInterrupt):
        fit()
    fit()
    assert trained[6:8] == [7, 7], "it resumed after step 6, as it should"
    assert trained[-1] == STEPS * EPOCHS + 2, "then two batches of the epoch are trained twice"


# ------------------------------------------------------------ refusals


def test_refuses_arrays(keras: Any, tmp_path: Path) -> None:
    from common.keras import CheckpointCallback

    with CheckpointManager(tmp_path, save_every=1) as checkpoints:
        checkpoint = CheckpointCallback(checkpoints)
        with pytest.raises(CheckpointError, match=r"do not come from CheckpointCallback.steps.*shuffles"):
            new_model(keras).fit(*samples(), batch_size=8, verbose=0, callbacks=[checkpoint])
        assert checkpoints.latest is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_per_epoch": None}, "without steps_per_epoch"),
        ({"initial_epoch": 2}, "fit begins with epoch 2, but 0 are done"),
    ],
)
def test_refuses_fit_options(keras: Any, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        attempt(keras, tmp_path, **options)


def test_refuses_models(keras: Any, tmp_path: Path) -> None:
    from common.keras import CheckpointCallback

    unbuilt = keras.Sequential([keras.layers.Dense(3)])
    unbuilt.compile("adam", "mse")
    for model, message in [
        (new_model(keras, steps_per_execution=2), "steps_per_execution=2"),
        (unbuilt, "keras.Input"),
    ]:
        with CheckpointManager(tmp_path) as checkpoints:
            checkpoint = CheckpointCallback(checkpoints)
            with pytest.raises(CheckpointError, match=message):
                model.fit(dataset(checkpoint.steps), steps_per_epoch=STEPS, verbose=0, callbacks=[checkpoint])


def test_refuses_several_devices(keras: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "DataParallel")
    with pytest.raises(CheckpointError, match="distributed over several devices"):
        attempt(keras, tmp_path)


def test_refuses_other_callbacks(keras: Any) -> None:
    from common.keras import CheckpointCallback

    with pytest.raises(CheckpointError, match="a CSVLogger: only EarlyStopping and ReduceLROnPlateau"):
        CheckpointCallback(None, callbacks=[keras.callbacks.CSVLogger("log.csv")])


def test_refuses_checkpoints_of_something_else(keras: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("FAULTS", "raise@step=4")
    with pytest.raises(FaultInjected):
        attempt(keras, tmp_path)
    with pytest.raises(CheckpointError, match="step 3 of an epoch, but steps_per_epoch is now 2"):
        attempt(keras, tmp_path, steps_per_epoch=2)
    with pytest.raises(CheckpointError, match="with other callbacks"):
        attempt(keras, tmp_path, patience(keras))
    monkeypatch.setattr(keras.optimizers, "Adam", keras.optimizers.SGD)
    with pytest.raises(CheckpointError, match=r"another model or optimizer.*momentum: .* -> \(absent\)"):
        attempt(keras, tmp_path)


def test_load_best_needs_keep_best(keras: Any, tmp_path: Path) -> None:
    from common.keras import CheckpointCallback

    with CheckpointManager(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="keep_best"):
        CheckpointCallback(checkpoints).load_best()


def test_stops_when_asked(keras: Any, straight: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("FAULTS", "term@step=5")
    with pytest.raises(StopRequested):
        attempt(keras, tmp_path)
    again = attempt(keras, tmp_path)
    assert again["resumed_from"] == [5]
    assert again["weights"] == straight["weights"]


# ------------------------------------------------------------ the example


def test_accuracy_and_model_file(digits: ModuleType, tmp_path: Path) -> None:
    """98% is what the README states; the saved model is what the next step loads."""
    with CheckpointManager(tmp_path, keep_best=("val_loss", "min")) as checkpoints:
        result = digits.train(digits.TrainConfig(), checkpoints)
        accuracy, counts = digits.confusion_matrix(str(result.path), "digits")
        files = {path.name for path in Path(checkpoints.latest).iterdir()}
    assert accuracy >= 0.96
    best = min((record for record in result.history if "val_loss" in record), key=lambda record: record["val_loss"])
    assert accuracy == pytest.approx(best["val_accuracy"])
    assert np.sum(counts) == len(digits.load_data("digits").val_labels)
    assert files == {"state.safetensors", "state.json", "manifest.json"}


def test_mnist(digits: ModuleType, monkeypatch: Any, tmp_path: Path) -> None:
    """keras.datasets.mnist is used as it is, with 100 images in the place of the download."""
    data = digits.load_data("digits")
    pair = data.train_images[:100], data.train_labels[:100].astype("uint8")
    monkeypatch.setattr(digits.keras.datasets.mnist, "load_data", lambda: (pair, pair))
    with CheckpointManager(tmp_path, keep_best=("val_loss", "min")) as checkpoints:
        result = digits.train(digits.TrainConfig(dataset="mnist", epochs=1), checkpoints)
    assert result.history[-1]["step"] == 2


@pytest.mark.parametrize(("field", "value"), [("dataset", "imagenet"), ("epochs", 0), ("batch_size", -1)])
def test_bad_configuration(digits: ModuleType, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=str(value)):
        digits.TrainConfig(**{field: value})
