"""Train a small residual network in several processes that keep step. Kill any of them: all come back, exactly.

python train.py                               # alone; checkpoints go to checkpoints/, run it again after a kill
torchrun --nproc_per_node 2 train.py          # two processes, the same global batch
"""

import math
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from common import ResumableSampler, die_with_parent, seed_everything, weights_digest
from common.data import ImageData, cifar10, photo_digits
from common.distributed import DistributedCheckpointManager, DistributedTrainState


@dataclass(frozen=True)
class TrainConfig:
    """Everything that the result depends on, but the number of ranks; batch_size is that of all ranks together."""

    dataset: str = "digits"  # or "cifar10": the real one, downloaded by torchvision
    model: str = "small"  # or "resnet18", "resnet50" of torchvision
    epochs: int = 8
    batch_size: int = 128
    learning_rate: float = 6e-3
    dropout: float = 0.0
    width: int = 16  # channels of the small network's first block
    backgrounds: int = 4  # photographs behind each training digit
    seed: int = 0

    def __post_init__(self):
        for name, known in (("dataset", ("digits", "cifar10")), ("model", ("small", "resnet18", "resnet50"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if min(self.epochs, self.batch_size, self.backgrounds) < 1 or self.width < 4 or self.width % 4:
            raise ValueError("epochs, batch_size and backgrounds must be 1 or more, width a multiple of 4")

    def check_ranks(self, ranks: int) -> None:
        if ranks < 1 or self.batch_size % ranks:
            raise ValueError(f"a global batch of {self.batch_size} cannot be divided among {ranks} ranks")


@dataclass(frozen=True)
class TrainResult:
    path: Path | None  # on rank 0 a directory with model.safetensors: the weights with the lowest validation loss
    history: list
    weights_digest: str
    images_per_second: float  # that this rank has trained


def load_data(config: TrainConfig) -> ImageData:
    return photo_digits(config.backgrounds) if config.dataset == "digits" else cifar10()


def to_tensor(images) -> torch.Tensor:
    return (torch.as_tensor(images).movedim(-1, -3).float() / 255 - 0.5) / 0.25  # (..., 3, 32, 32)


class AugmentedImages(Dataset):
    """Shifts each image by up to two pixels, mirrors photographs. A pure function of (seed, epoch, index).

    Workers of the loader must not persist: they would keep their first copy of it, whose epoch never changes.
    """

    def __init__(self, images, labels, config: TrainConfig):
        self.images = F.pad(torch.from_numpy(images), (0, 0, 2, 2, 2, 2))  # (samples, 36, 36, 3), uint8
        self.labels, self.seed, self.mirror, self.epoch = labels, config.seed, config.dataset == "cifar10", 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed((self.seed * 10_007 + self.epoch) * 1_000_003 + index)
        x, y, mirrored = torch.randint(5, (3,), generator=generator).tolist()
        image = to_tensor(self.images[index, y : y + 32, x : x + 32])
        return image.flip(-1) if self.mirror and mirrored < 2 else image, int(self.labels[index])


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        # normalized over groups of channels, not over the batch: a rank sees only its part of that
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(4, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


def build_model(config: TrainConfig) -> nn.Module:
    if config.model != "small":
        from torchvision import models

        return getattr(models, config.model)(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    w = config.width
    return nn.Sequential(
        nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.GroupNorm(4, w), nn.ReLU(),
        Block(w, w, 1), Block(w, 2 * w, 2), Block(2 * w, 4 * w, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(config.dropout), nn.Linear(4 * w, 10),
    )  # fmt: skip


def sum_over_ranks(*values: torch.Tensor | float) -> list[float]:
    total = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(model: nn.Module, images, labels, device) -> dict[str, float]:
    """Each rank takes every n-th image: none is padded, so none counts twice."""
    model.eval()
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    targets = torch.from_numpy(labels[mine])
    logits = torch.cat([model(to_tensor(part).to(device)).cpu() for part in torch.from_numpy(images[mine]).split(250)])
    right, loss = (logits.argmax(1) == targets).sum(), F.cross_entropy(logits, targets, reduction="sum")
    right, loss, count = sum_over_ranks(right, loss, len(targets))
    return {"val_loss": loss / count, "val_accuracy": right / count}


@torch.no_grad()
def right_per_class(model_path: str, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Load a saved model; return how many test images of each class it gets right, and how many there are."""
    model = build_model(config).eval()
    model.load_state_dict(load_file(Path(model_path) / "model.safetensors"))
    data = load_data(config)
    guesses = torch.cat([model(to_tensor(part)).argmax(1) for part in torch.from_numpy(data.test_images).split(250)])
    right = data.test_labels[guesses.numpy() == data.test_labels]
    return np.bincount(right, minlength=10).tolist(), np.bincount(data.test_labels, minlength=10).tolist()


def join_gang(timeout: float) -> None:
    """Become one of the ranks that torchrun started; without it, a gang of one."""
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return
    die_with_parent()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # a little later than the manager's watch, which shows where a rank hangs
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout + 10))


def choose_device() -> torch.device:
    """This rank's own GPU if every rank of the gang has one, or else the CPU: NCCL refuses two ranks on one GPU.

    LOCAL_RANK counts the ranks of a node; on a laptop several nodes share one machine and its GPUs.
    """
    rank, places = dist.get_rank(), [("", 0)] * dist.get_world_size()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    dist.all_gather_object(places, (socket.gethostname(), gpus))
    if any(places.count(place) > place[1] for place in places):
        if gpus and rank == 0:
            print(f"[gang] {len(places)} ranks have no GPU each: they train on the CPU", flush=True)
        return torch.device("cpu")
    device = torch.device("cuda", places[:rank].count(places[rank]))
    torch.cuda.set_device(device)
    return device


def train(config: TrainConfig, checkpoints: DistributedCheckpointManager) -> TrainResult:
    if not dist.is_initialized():
        join_gang(timeout=300)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    config.check_ranks(ranks)
    device = choose_device()
    seed_everything(config.seed)
    data = load_data(config)
    dataset = AugmentedImages(data.train_images, data.train_labels, config)
    sampler = ResumableSampler(len(dataset), config.seed, rank=rank, world_size=ranks)
    loader = DataLoader(dataset, config.batch_size // ranks, sampler=sampler, generator=torch.Generator())
    steps_per_epoch = math.ceil(len(dataset) / config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    nothing = torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.int64)

    model = build_model(config).to(device)
    parallel = DistributedDataParallel(model)
    # the first backward pass settles in which order gradients are packed and so added up: before anything is restored
    parallel(torch.zeros(1, 3, 32, 32, device=device)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps)
    seed_everything(config.seed + rank)  # every rank has dropout masks of its own

    state = DistributedTrainState(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler)
    checkpoints.restore(state, {**asdict(config), "data": data.fingerprint}, total_steps=total_steps)

    trained, seconds = 0, 0.0
    for epoch in range(state.epoch, config.epochs):
        began = time.perf_counter()
        dataset.epoch = epoch
        sampler.set_epoch(epoch, start=state.step_in_epoch * config.batch_size)  # counted over all ranks
        model.train()
        # all ranks make the same steps: the last batch of an epoch may have fewer images than there are ranks
        for images, labels in islice(chain(loader, repeat(nothing)), steps_per_epoch - state.step_in_epoch):
            images, labels = images.to(device), labels.to(device)
            count = min(config.batch_size, len(dataset) - state.step_in_epoch * config.batch_size)  # of all ranks
            loss = F.cross_entropy(parallel(images), labels, reduction="sum") / count  # this rank's part of the mean
            optimizer.zero_grad()
            (loss * ranks).backward()  # DistributedDataParallel divides by the number of ranks
            optimizer.step()
            lr_scheduler.step()
            checkpoints.step(state, {"loss": sum_over_ranks(loss.detach())[0]})  # all ranks save, and stop, together
            trained += len(labels)
        seconds += time.perf_counter() - began
        metrics = evaluate(model, data.val_images, data.val_labels, device)
        checkpoints.epoch_end(state, metrics)
        if rank == 0:
            print(
                f"epoch {epoch + 1:2}/{config.epochs}  step {state.step:4}/{total_steps}  "
                f"val_loss {metrics['val_loss']:.4f}  val_accuracy {metrics['val_accuracy']:.2%}  "
                f"{time.perf_counter() - began:.1f} s",
                flush=True,
            )

    speed = trained / seconds if seconds else 0.0
    if rank != 0:  # rank 0 alone has the checkpoints
        return TrainResult(None, list(state.history), "", speed)
    weights = checkpoints.load_best()["model"]
    save_file(weights, checkpoints.directory / "model.safetensors")
    return TrainResult(checkpoints.directory, list(state.history), weights_digest(weights), speed)


if __name__ == "__main__":
    join_gang(timeout=300)
    keep = {"save_every": 20, "keep_best": ("val_loss", "min"), "fresh": "--fresh" in sys.argv}
    with DistributedCheckpointManager(**keep) as checkpoints:
        result = train(TrainConfig(), checkpoints)
    if result.path:
        best = max(record.get("val_accuracy", 0) for record in result.history)
        print(f"best val_accuracy {best:.2%}, weights {result.weights_digest[:16]}")
    dist.destroy_process_group()
