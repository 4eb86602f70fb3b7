"""Train a digit classifier with the Trainer of Hugging Face. Kill it whenever you like: it ends as if nothing happened.

python train.py                      # checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    ViTImageProcessor,
)
from transformers.utils import logging

from common import CheckpointManager, seed_everything, weights_digest
from common.data import ImageData, digits
from common.transformers import CheckpointCallback, ResumableTrainer

logging.disable_progress_bar()
MNIST = "ylecun/mnist"  # on the Hugging Face Hub


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the result depends on; a checkpoint made under another configuration is refused."""

    dataset: str = "digits"  # or "mnist": the real one, downloaded from the Hugging Face Hub
    revision: str = ""  # of the real one: a branch, a tag or, as the flow does it, a commit
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 5e-3
    drop_path: float = 0.1  # how often a block is left out in training, at random
    seed: int = 0

    def __post_init__(self):
        if self.dataset not in ("digits", "mnist"):
            raise ValueError(f"dataset is {self.dataset!r}: choose digits (offline) or mnist (downloaded)")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be 1 or more, not {self.epochs} and {self.batch_size}")


@dataclass(frozen=True)
class TrainResult:
    path: Path  # a directory for from_pretrained: the model, and the image processor that belongs to it
    history: list
    weights_digest: str


def resolve(dataset: str, revision: str) -> str:
    """The commit that a revision of the data set stands for today; the digits have none."""
    if dataset == "digits":
        return ""
    return HfApi().dataset_info(MNIST, revision=revision or None).sha


def load_data(name: str, revision: str = "") -> ImageData:
    if name == "digits":
        return digits()
    import datasets

    splits = datasets.load_dataset(MNIST, revision=revision or None).with_format("numpy")
    train, test = splits["train"][:], splits["test"][:]
    return ImageData(np.stack(train["image"]), train["label"], np.stack(test["image"]), test["label"])


def to_pixels(processor, images) -> torch.Tensor:
    return processor(list(images[:, None]), input_data_format="channels_first", return_tensors="pt")["pixel_values"]


class Digits(Dataset):
    """Images for the model; with a seed, each is shifted by up to two pixels and gets noise.

    What happens to a sample is a pure function of (seed, epoch, index). The Trainer reads one batch ahead, so a global
    random state would not be where it was after a restart; CheckpointCallback notices that and refuses.
    """

    def __init__(self, pixels: torch.Tensor, labels, seed: int | None = None):
        self.pixels, self.labels, self.seed, self.epoch = F.pad(pixels, (2, 2, 2, 2), value=-1.0), labels, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch  # called by CheckpointCallback

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        if self.seed is None:
            return {"pixel_values": self.pixels[index, :, 2:-2, 2:-2], "labels": int(self.labels[index])}
        generator = torch.Generator().manual_seed((self.seed * 10_007 + self.epoch) * 1_000_003 + index)
        x, y = torch.randint(5, (2,), generator=generator).tolist()
        image = self.pixels[index, :, y : y + 28, x : x + 28]
        image = image + 0.05 * torch.randn(image.shape, generator=generator)
        return {"pixel_values": image, "labels": int(self.labels[index])}


class Progress(TrainerCallback):
    """One line per epoch."""

    def on_evaluate(self, args, state, control, metrics, **_):
        print(
            f"epoch {round(state.epoch):2}/{args.num_train_epochs}  step {state.global_step:4}/{state.max_steps}  "
            f"eval_loss {metrics['eval_loss']:.4f}  eval_accuracy {metrics['eval_accuracy']:.2%}", flush=True,
        )  # fmt: skip


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def confusion_matrix(model: str, data: ImageData, dtype="float32", revision="main") -> tuple[float, list[list[int]]]:
    """Load a model, from a directory or at a revision from the Hub; return its accuracy and what it took for what."""
    processor = AutoImageProcessor.from_pretrained(model, revision=revision)
    classifier = AutoModelForImageClassification.from_pretrained(model, dtype=dtype, revision=revision).eval()
    with torch.no_grad():
        batches = to_pixels(processor, data.val_images).to(classifier.dtype).split(500)
        guesses = torch.cat([classifier(pixel_values=batch).logits for batch in batches]).argmax(1).numpy()
    counts = [np.bincount(guesses[data.val_labels == digit], minlength=10).tolist() for digit in range(10)]
    return float((guesses == data.val_labels).mean()), counts


def train(config: TrainConfig, checkpoints: CheckpointManager) -> TrainResult:
    seed_everything(config.seed)
    data = load_data(config.dataset, config.revision)
    processor = ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.5], image_std=[0.5])
    model = AutoModelForImageClassification.from_config(
        ConvNextConfig(
            num_channels=1, image_size=28, patch_size=4, num_stages=2, hidden_sizes=[32, 64], depths=[2, 2],
            layer_scale_init_value=1.0, drop_path_rate=config.drop_path, num_labels=10,
        )
    )  # fmt: skip

    checkpoint = CheckpointCallback(checkpoints)  # saves when due, or when asked to stop
    trainer = ResumableTrainer(
        model,
        TrainingArguments(
            str(checkpoints.directory / "trainer"), seed=config.seed, num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size, per_device_eval_batch_size=500,
            learning_rate=config.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1,  # a tenth of all
            eval_strategy="epoch", logging_steps=5, report_to="none", disable_tqdm=True,
            save_strategy="no",  # the manager decides: --save-every, --save-strategy
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Digits(to_pixels(processor, data.train_images), data.train_labels, config.seed),
        eval_dataset=Digits(to_pixels(processor, data.val_images), data.val_labels),
        compute_metrics=accuracy,
        callbacks=[Progress(), checkpoint],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    total_steps = config.epochs * math.ceil(len(data.train_labels) / config.batch_size)
    resume_from = checkpoints.restore_files({**asdict(config), "data": data.fingerprint}, total_steps=total_steps)
    trainer.train(resume_from_checkpoint=resume_from)  # a verified private copy, or None

    # the best by the metric of keep_best; without keep_best the last
    kept = checkpoints.load_best_files() if checkpoints.best else checkpoints.load_files(checkpoints.latest)
    model, path = AutoModelForImageClassification.from_pretrained(kept), checkpoints.directory / "model"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return TrainResult(path, checkpoint.history, weights_digest(model.state_dict()))


if __name__ == "__main__":
    with CheckpointManager(keep_best=("eval_loss", "min"), fresh="--fresh" in sys.argv) as checkpoints:
        result = train(TrainConfig(), checkpoints)
    best = max(record.get("eval_accuracy", 0) for record in result.history)
    print(f"best eval_accuracy {best:.2%}, weights {result.weights_digest[:16]}")
