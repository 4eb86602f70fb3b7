"""Each adapter beside the framework's own checkpoint callback: how long a save blocks the training thread.

python benchmarks/adapters.py --only keras,lightning,trainer,xgboost

The framework's callback and ours take part in the same training, at the same steps; what the callback's saving method
takes is timed. Both store everything that they need to go on: weights and optimizer (XGBoost: the model).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import Row, least, quiet, report, timed

import common


def row(framework, ours, theirs, own_callback):
    # the first saves allocate
    values = {"common": statistics.median(ours[2:]) * 1000, own_callback: statistics.median(theirs[2:]) * 1000}
    ratio = values["common"] / values[own_callback]
    spread = least(ours[2:], theirs[2:])
    return Row(f"{framework}: blocked by a save", own_callback, ratio, 1.0, values, least=spread)


def keras(saves, width):
    import keras
    import tensorflow as tf

    from common.keras import CheckpointCallback

    model = keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width) for _ in range(4))])
    model.compile("adam", "mse")
    rows = tf.random.normal((8, width))
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name, common.CheckpointManager(Path(name) / "ours", save_every=1) as manager:
        keras_callback = keras.callbacks.ModelCheckpoint(Path(name) / "theirs.keras", save_freq=1)
        callback = CheckpointCallback(manager, {})
        undo = [timed(manager, "_save_state", ours), timed(keras_callback, "_save_model", theirs)]

        class Drain(keras.callbacks.Callback):
            """Each save for itself: a writer that still works is no part of the next one."""

            def on_train_batch_begin(self, batch, logs=None):
                manager._writer.drain()

        data = tf.data.Dataset.from_generator(callback.steps, output_types=(tf.int64, tf.int64))
        data = data.map(lambda epoch, step: (rows, rows))
        with quiet():
            model.fit(data, steps_per_epoch=saves, epochs=1, verbose=0, callbacks=[keras_callback, callback, Drain()])
        for one in undo:
            one()
    return row("Keras", ours, theirs, "ModelCheckpoint")


def lightning(saves, width):
    import lightning.pytorch as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from common.lightning import CheckpointCallback, ResumableLoader

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))

        def training_step(self, batch, _):
            manager._writer.drain()  # each save for itself
            return self.layers(batch[0]).square().mean()

        def validation_step(self, batch, _):
            self.log("val_loss", self.layers(batch[0]).square().mean())

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    data = TensorDataset(torch.randn(saves + 1, width))
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name, common.CheckpointManager(Path(name) / "ours", save_every=1) as manager:
        callback = CheckpointCallback(manager)
        path = callback.restore({})
        own = pl.callbacks.ModelCheckpoint(manager.directory / "theirs", every_n_train_steps=1)
        timed(callback, "_save", ours)
        timed(own, "_save_topk_checkpoint", theirs)
        trainer = pl.Trainer(max_epochs=1, callbacks=[own, callback], logger=False, enable_progress_bar=False,
                             enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0)  # fmt: skip
        trainer.fit(Module(), ResumableLoader(data, 1, seed=0), DataLoader(data), ckpt_path=path, weights_only=True)
    return row("Lightning", ours, theirs, "ModelCheckpoint")


def trainer(saves, width):
    import torch
    import transformers
    from torch.utils.data import Dataset

    from common.transformers import CheckpointCallback, ResumableTrainer

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(4)))

        def forward(self, x):
            manager._writer.drain()  # each save for itself
            return {"loss": self.layers(x).square().mean()}

    class Rows(Dataset):
        def __len__(self):
            return saves

        def __getitem__(self, index):
            return {"x": torch.ones(width) * index}

    def fit(kind, timed_method, into, callbacks, **settings):
        arguments = transformers.TrainingArguments(
            Path(name) / kind.__name__, per_device_train_batch_size=1, num_train_epochs=1, report_to="none",
            use_cpu=True, disable_tqdm=True, logging_strategy="no", **settings,
        )  # fmt: skip
        one = kind(Model(), arguments, train_dataset=Rows(), callbacks=callbacks)
        timed(one, timed_method, into)
        one.train()

    ours, theirs, inner = [], [], []
    with tempfile.TemporaryDirectory() as name, common.CheckpointManager(Path(name) / "ours", save_every=1) as manager:
        manager.restore_files({})
        callback = CheckpointCallback(manager)
        timed(callback, "on_save", inner)
        fit(ResumableTrainer, "_save_checkpoint", ours, [callback], save_strategy="no")
        fit(transformers.Trainer, "_save_checkpoint", theirs, [], save_steps=1, save_total_limit=2)
    return row("Trainer", [a + b for a, b in zip(ours, inner, strict=True)], theirs, "its own checkpoints")


def xgboost(saves, width):
    import numpy as np
    import xgboost as xgb

    from common.xgboost import CheckpointCallback, train_in_segments

    generator = np.random.default_rng(0)
    data = xgb.DMatrix(generator.standard_normal((20000, 20)), generator.integers(0, 2, 20000))
    params = {"objective": "binary:logistic", "max_depth": 8, "nthread": 1}
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as name:
        # both save every tenth round, so both pay for the growing model alike
        own = xgb.callback.TrainingCheckPoint(name, interval=10)
        timed(own, "after_iteration", theirs)
        xgb.train(params, data, 10 * saves, callbacks=[own])
        with common.CheckpointManager(Path(name) / "ours", save_every=10) as manager, quiet():
            callback = CheckpointCallback(manager, {}, segment=10)
            timed(callback, "after_iteration", ours)
            train_in_segments(params, data, 10 * saves, evals=[(data, "train")], callback=callback)
    return row("XGBoost", ours[9::10], sorted(theirs, reverse=True)[: saves - 1], "TrainingCheckPoint")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="keras,lightning,trainer,xgboost")
    parser.add_argument("--saves", type=int, default=12)
    parser.add_argument("--width", type=int, default=1000, help="of four square layers: 1000 is 48 MB with Adam")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    first, *others = arguments.only.split(",")
    report([globals()[first](arguments.saves, arguments.width)], arguments.json)
    if others:  # TensorFlow and PyTorch do not always bear each other in one process
        options = f"--only {','.join(others)} --saves {arguments.saves} --width {arguments.width}".split()
        subprocess.run([sys.executable, __file__, *options, "--json", arguments.json], check=True)
