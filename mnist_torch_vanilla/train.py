"""Train a digit classifier in plain PyTorch. Kill it whenever you like: it ends as if nothing had happened.

python train.py                      # checkpoints go to checkpoints/; run it again after a kill
python train.py --fresh              # forget them and start anew
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from common import CheckpointManager, ResumableSampler, TrainState, seed_everything, weights_digest
from common.data import ImageData, digits


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
    path: Path  # a directory with model.safetensors: the weights with the lowest validation loss
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
    """Shifts each image by up to two pixels and adds noise.

    What happens to a sample is a pure function of (seed, epoch, index). So no state of a data loader has to be
    saved, and neither the number of its workers nor how far they read ahead can change the result. Only leave
    persistent_workers off: such workers keep their first copy of the dataset, whose epoch never changes.
    """

    def __init__(self, images, labels, seed: int):
        self.images, self.labels, self.seed, self.epoch = F.pad(to_tensor(images), (2, 2, 2, 2)), labels, seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed((self.seed * 10_007 + self.epoch) * 1_000_003 + index)
        x, y = torch.randint(5, (2,), generator=generator).tolist()
        image = self.images[index, :, y : y + 28, x : x + 28]
        return image + 0.05 * torch.randn(image.shape, generator=generator), int(self.labels[index])


def build_model(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Dropout(dropout), nn.Linear(32 * 7 * 7, 10),
    )  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, images, labels) -> dict[str, float]:
    model.eval()
    logits = torch.cat([model(batch) for batch in to_tensor(images).split(500)])
    targets = torch.from_numpy(labels)
    return {
        "val_loss": F.cross_entropy(logits, targets).item(),
        "val_accuracy": (logits.argmax(1) == targets).float().mean().item(),
    }


def confusion_matrix(model_path: str, dataset: str) -> tuple[float, list[list[int]]]:
    """Load a saved model; return its validation accuracy and how often each digit was taken for which."""
    model = build_model()
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
    sampler = ResumableSampler(len(dataset), config.seed)
    # iter(loader) draws a random number: from a generator of its own, so that the global one is not disturbed
    loader = DataLoader(dataset, config.batch_size, sampler=sampler, generator=torch.Generator())
    total_steps = config.epochs * len(loader)

    model = build_model(config.dropout)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps)

    # all that the next step depends on; the random states of torch, numpy and Python come with it
    state = TrainState(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler)
    checkpoints.restore(state, {**asdict(config), "data": data.fingerprint}, total_steps=total_steps)

    for epoch in range(state.epoch, config.epochs):
        began = time.perf_counter()
        dataset.epoch = epoch
        sampler.set_epoch(epoch, start=state.step_in_epoch * config.batch_size)  # mid-epoch after a kill
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lr_scheduler.step()
            checkpoints.step(state, {"loss": loss.item()})  # saves when due, or when asked to stop
        metrics = evaluate(model, data.val_images, data.val_labels)
        checkpoints.epoch_end(state, metrics)
        print(
            f"epoch {epoch + 1:2}/{config.epochs}  step {state.step:4}/{total_steps}  "
            f"val_loss {metrics['val_loss']:.4f}  val_accuracy {metrics['val_accuracy']:.2%}  "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )

    weights = checkpoints.load_best()["model"]
    save_file(weights, checkpoints.directory / "model.safetensors")
    return TrainResult(checkpoints.directory, list(state.history), weights_digest(weights))


if __name__ == "__main__":
    with CheckpointManager(keep_best=("val_loss", "min"), fresh="--fresh" in sys.argv) as checkpoints:
        result = train(TrainConfig(), checkpoints)
    best = max(record.get("val_accuracy", 0) for record in result.history)
    print(f"best val_accuracy {best:.2%}, weights {result.weights_digest[:16]}")
