"""Train a digit classifier with Lightning. Kill it whenever you like: it ends as if nothing had happened.

python train.py                      # checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from common import CheckpointManager, seed_everything, weights_digest
from common.data import ImageData, digits
from common.lightning import CheckpointCallback, ResumableLoader

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the result depends on; a checkpoint made under another configuration is refused."""

    dataset: str = "digits"  # or "mnist": the real one, downloaded by torchvision
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
    path: Path  # a directory with model.safetensors: the weights with the highest validation accuracy
    history: list
    weights_digest: str


def load_data(name: str) -> ImageData:
    if name == "digits":
        return digits()
    from torchvision.datasets import MNIST

    train, test = MNIST("data", train=True, download=True), MNIST("data", train=False, download=True)
    return ImageData(train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy())


def to_tensor(images) -> torch.Tensor:
    return (torch.from_numpy(images).float() / 255)[:, None]  # (samples, 1, 28, 28), 0..1


class AugmentedDigits(Dataset):
    """Shifts each image by up to two pixels and adds noise: a pure function of (seed, epoch, index)."""

    def __init__(self, images, labels, seed: int):
        self.images, self.labels, self.seed, self.epoch = F.pad(to_tensor(images), (2, 2, 2, 2)), labels, seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:  # called by ResumableLoader
        self.epoch = epoch

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed((self.seed * 10_007 + self.epoch) * 1_000_003 + index)
        x, y = torch.randint(5, (2,), generator=generator).tolist()
        image = self.images[index, :, y : y + 28, x : x + 28]
        return image + 0.05 * torch.randn(image.shape, generator=generator), int(self.labels[index])


class DigitClassifier(LightningModule):
    """A small convolutional network. There is nothing about checkpoints in it."""

    def __init__(self, learning_rate: float = 3e-3, dropout: float = 0.0, total_steps: int = 1):
        super().__init__()
        self.learning_rate, self.total_steps = learning_rate, total_steps
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * 7 * 7, 10),
        )  # fmt: skip

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log_dict({"val_loss": F.cross_entropy(logits, labels), "val_acc": accuracy}, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EpochLines(ProgressBar):
    """A line for each epoch. For logs, where TQDMProgressBar would leave a mess: it draws its line again and again."""

    def on_train_epoch_end(self, trainer, module):
        epoch, values = trainer.current_epoch + 1, trainer.callback_metrics
        line = f"epoch {epoch:2}/{trainer.max_epochs}  step {trainer.global_step:4}/{module.total_steps}"
        print(f"{line}  val_loss {values['val_loss']:.4f}  val_acc {values['val_acc']:.2%}", flush=True)


def confusion_matrix(model_path: str, dataset: str) -> tuple[float, list[list[int]]]:
    """Load a saved model; return its validation accuracy and how often each digit was taken for which."""
    model = DigitClassifier()
    model.load_state_dict(load_file(Path(model_path) / "model.safetensors"))
    data = load_data(dataset)
    with torch.no_grad():
        guesses = model.eval()(to_tensor(data.val_images)).argmax(1)
    targets = torch.from_numpy(data.val_labels)
    counts = torch.zeros(10, 10, dtype=torch.int64).index_put_((targets, guesses), torch.tensor(1), accumulate=True)
    return (guesses == targets).float().mean().item(), counts.tolist()


def train(config: TrainConfig, checkpoints: CheckpointManager) -> TrainResult:
    seed_everything(config.seed)
    data = load_data(config.dataset)
    dataset = AugmentedDigits(data.train_images, data.train_labels, config.seed)
    loader = ResumableLoader(dataset, config.batch_size, seed=config.seed)
    val_loader = DataLoader(TensorDataset(to_tensor(data.val_images), torch.from_numpy(data.val_labels)), 500)
    total_steps = config.epochs * len(loader)
    model = DigitClassifier(config.learning_rate, config.dropout, total_steps)

    # Lightning's own: the best weights by two measures; CheckpointCallback brings the files over a restart
    directory = checkpoints.directory / "best"
    best_loss = ModelCheckpoint(directory, "loss-{epoch}", monitor="val_loss", save_weights_only=True)
    best_acc = ModelCheckpoint(directory, "acc-{epoch}", "val_acc", mode="max", save_top_k=2, save_weights_only=True)

    progress = TQDMProgressBar(leave=True) if sys.stdout.isatty() else EpochLines()
    checkpoint = CheckpointCallback(checkpoints)
    ckpt_path = checkpoint.restore({**asdict(config), "data": data.fingerprint}, total_steps=total_steps)
    trainer = Trainer(
        max_epochs=config.epochs,
        callbacks=[progress, best_loss, best_acc, checkpoint],
        log_every_n_steps=1,  # also of the history
        deterministic=True,
        devices=1,
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, val_loader, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.should_stop or trainer.global_step == total_steps, f"{trainer.global_step} of {total_steps} steps"

    weights = torch.load(best_acc.best_model_path, weights_only=True, map_location="cpu")["state_dict"]
    path = checkpoints.directory / "model"
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    return TrainResult(path, checkpoint.history, weights_digest(weights))


if __name__ == "__main__":
    with CheckpointManager(fresh="--fresh" in sys.argv) as checkpoints:
        result = train(TrainConfig(), checkpoints)
    best = max(record.get("val_acc", 0) for record in result.history)
    print(f"best val_acc {best:.2%}, weights {result.weights_digest[:16]}")
