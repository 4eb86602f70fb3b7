"""Train a digit classifier with Keras. Kill it whenever you like: it ends as if nothing had happened.

python train.py                      # checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is talkative; this must stand before its import

import keras
import numpy as np
import tensorflow as tf  # for the data pipeline; the model runs on whatever KERAS_BACKEND says

from common import CheckpointManager, weights_digest
from common.data import ImageData, digits
from common.keras import CheckpointCallback, named_arrays


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the result depends on; a checkpoint made under another configuration is refused."""

    dataset: str = "digits"  # or "mnist": the real one, downloaded by keras.datasets
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 3e-3
    dropout: float = 0.3
    seed: int = 0

    def __post_init__(self):
        if self.dataset not in ("digits", "mnist"):
            raise ValueError(f"dataset is {self.dataset!r}: choose digits (offline) or mnist (downloaded)")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be 1 or more, not {self.epochs} and {self.batch_size}")


@dataclass(frozen=True)
class TrainResult:
    path: Path  # a directory with model.keras: the model with the lowest validation loss
    history: list
    weights_digest: str


def load_data(name: str) -> ImageData:
    if name == "digits":
        return digits()
    (train_images, train_labels), (val_images, val_labels) = keras.datasets.mnist.load_data()
    return ImageData(train_images, train_labels.astype("int64"), val_images, val_labels.astype("int64"))


def make_dataset(data: ImageData, config: TrainConfig, steps) -> tf.data.Dataset:
    """A batch for each (epoch, step) that ``steps`` yields.

    A batch is a pure function of (seed, epoch, step). So the pipeline has no state to save, and neither its threads nor
    how far it reads ahead can change the result. Give ``tf.random`` operations in it a stateless form, too.
    """
    images, labels = tf.constant(data.train_images[..., None]), tf.constant(data.train_labels)
    size, seed = len(data.train_labels), config.seed

    def load_batch(epoch, step):
        first = step * config.batch_size
        places = tf.range(first, tf.minimum(first + config.batch_size, size))
        # one permutation per epoch, computed for these places only
        rows = tf.random.experimental.index_shuffle(places, tf.stack([seed, epoch]), size - 1)
        return tf.gather(images, rows), tf.gather(labels, rows)

    position = tf.TensorSpec((), tf.int64)
    dataset = tf.data.Dataset.from_generator(steps, output_signature=(position, position))
    return dataset.map(load_batch, num_parallel_calls=2, deterministic=True).prefetch(2)


def build_model(dropout: float) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((28, 28, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.RandomTranslation(0.08, 0.08, fill_mode="constant"),  # random in training only, like Dropout
            layers.Conv2D(16, 3, strides=2, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU(),
            layers.Conv2D(32, 3, strides=2, padding="same"), layers.BatchNormalization(momentum=0.9), layers.ReLU(),
            layers.Flatten(),
            layers.Dropout(dropout),
            layers.Dense(10),
        ],
        name="digits",
    )  # fmt: skip


def confusion_matrix(model_path: str, dataset: str) -> tuple[float, list[list[int]]]:
    """Load a saved model; return its validation accuracy and how often each digit was taken for which."""
    model = keras.saving.load_model(Path(model_path) / "model.keras")
    data = load_data(dataset)
    guesses = model.predict(data.val_images[..., None], batch_size=500, verbose=0).argmax(1)
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (data.val_labels, guesses), 1)
    return float((guesses == data.val_labels).mean()), counts.tolist()


def train(config: TrainConfig, checkpoints: CheckpointManager) -> TrainResult:
    keras.utils.set_random_seed(config.seed)  # Python, numpy and the backend
    tf.config.experimental.enable_op_determinism()
    data = load_data(config.dataset)
    steps_per_epoch = math.ceil(len(data.train_labels) / config.batch_size)

    model = build_model(config.dropout)
    model.compile(
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(config.learning_rate, config.epochs * steps_per_epoch)
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    # restores when fit begins, saves when due or when asked to stop, and tells the data which steps are left
    checkpoint = CheckpointCallback(checkpoints, {**asdict(config), "data": data.fingerprint})
    model.fit(
        make_dataset(data, config, checkpoint.steps),
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        validation_data=(data.val_images[..., None], data.val_labels),
        validation_batch_size=500,
        callbacks=[checkpoint],
        shuffle=False,  # make_dataset does
        verbose=2,
    )

    checkpoint.load_best()
    model.save(checkpoints.directory / "model.keras")
    return TrainResult(checkpoints.directory, checkpoint.history, weights_digest(named_arrays(model.weights)))


if __name__ == "__main__":
    with CheckpointManager(keep_best=("val_loss", "min"), fresh="--fresh" in sys.argv) as checkpoints:
        result = train(TrainConfig(), checkpoints)
    best = max(record.get("val_accuracy", 0) for record in result.history)
    print(f"best val_accuracy {best:.2%}, weights {result.weights_digest[:16]}")
