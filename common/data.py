"""Real data that ships with scikit-learn, shaped like the data sets it stands for. Nothing is downloaded."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np


@dataclass(frozen=True)
class ImageData:
    """Images and labels, split for training and validation.

    Attributes:
        train_images, val_images: uint8, (samples, height, width) or (samples, height, width, channels), 0..255.
        train_labels, val_labels: int64, (samples,).
        test_images, test_labels: the same, where there is a third part that no training sees; else None.
        fingerprint: hash of what the training sees; part of its configuration.
    """

    train_images: Any
    train_labels: Any
    val_images: Any
    val_labels: Any
    test_images: Any = None
    test_labels: Any = None

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.train_images, self.train_labels, self.val_images, self.val_labels)


@dataclass(frozen=True)
class TabularData:
    """Rows and labels, split for training and validation.

    Attributes:
        train_rows, val_rows: float32, (samples, features).
        train_labels, val_labels: int64, (samples,).
        feature_names: one name per column.
        fingerprint: hash of all of it; part of a training's configuration.
    """

    train_rows: Any
    train_labels: Any
    val_rows: Any
    val_labels: Any
    feature_names: list[str]

    @property
    def fingerprint(self) -> str:
        names = np.array(self.feature_names)
        return fingerprint(self.train_rows, self.train_labels, self.val_rows, self.val_labels, names)


def fingerprint(*arrays: Any) -> str:
    """The first 16 hex digits of a SHA-256 over dtype, shape and bytes of the arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()[:16]


def digits() -> ImageData:
    """1,797 handwritten digits from scikit-learn, enlarged from 8x8 to MNIST's 28x28; one in five validates.

    The split is stratified and fixed. Source of the data: the UCI ML hand-written digits, by ``load_digits``.
    """
    from sklearn import datasets, model_selection  # pyright: ignore[reportMissingTypeStubs]

    bunch = cast("Any", datasets).load_digits()
    images = np.rint(enlarge(bunch.images / 16.0, 28) * 255).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    split = cast("Any", model_selection).train_test_split
    train, val = split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return ImageData(images[train], labels[train], images[val], labels[val])


def photo_digits(backgrounds: int = 4) -> ImageData:
    """Digits over crops of two photographs: 32x32 RGB, ten classes. A tenth of the digits validates, a tenth tests.

    Each pixel is the distance between digit and photograph, so that no colour gives the digit away. Each training digit
    is put on ``backgrounds`` crops, each other one on two; split and crops are fixed. Source: ``load_digits`` and
    ``load_sample_images`` of scikit-learn.
    """
    from sklearn import datasets  # pyright: ignore[reportMissingTypeStubs]

    source = cast("Any", datasets)
    bunch, photos = source.load_digits(), [photo / 255.0 for photo in source.load_sample_images().images]
    digits = np.pad(enlarge(bunch.images / 16.0, 28), ((0, 0), (2, 2), (2, 2)))[..., None]
    labels = bunch.target.astype(np.int64)
    parts: list[Any] = []
    for part, copies in zip(_split(labels, (8, 1, 1)), (backgrounds, 2, 2), strict=True):
        random = np.random.default_rng(len(parts))
        chosen = np.repeat(part, copies)
        crops = [_crop(photos[random.integers(2)], 32, random) for _ in chosen]
        parts += [np.rint(np.abs(np.stack(crops) - digits[chosen]) * 255).astype(np.uint8), labels[chosen]]
    return ImageData(*parts)


def cifar10(directory: str = "data") -> ImageData:
    """The real CIFAR-10 through torchvision, downloaded once; 5,000 of its training images validate, a fixed choice."""
    import fcntl
    from importlib import import_module

    load: Any = import_module("torchvision.datasets").CIFAR10
    Path(directory).mkdir(exist_ok=True)
    with open(Path(directory) / ".lock", "w") as lock:  # the ranks of a node share the directory: one downloads
        fcntl.flock(lock, fcntl.LOCK_EX)
        train, test = load(directory, train=True, download=True), load(directory, train=False, download=True)
    labels, test_labels = np.asarray(train.targets, np.int64), np.asarray(test.targets, np.int64)
    kept, val = _split(labels, (9, 1))
    return ImageData(train.data[kept], labels[kept], train.data[val], labels[val], test.data, test_labels)


def _split(labels: Any, shares: tuple[int, ...]) -> list[Any]:
    """Indices in parts of the given proportions, each class divided alike. The same at every call."""
    random = np.random.default_rng(0)
    parts: list[list[Any]] = [[] for _ in shares]
    for label in np.unique(labels):
        indices = random.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(shares)[:-1] * len(indices) // sum(shares)
        for part, piece in zip(parts, np.split(indices, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _crop(photo: Any, size: int, random: Any) -> Any:
    y, x = random.integers(photo.shape[0] - size), random.integers(photo.shape[1] - size)
    return photo[y : y + size, x : x + size]


def breast_cancer() -> TabularData:
    """569 tumours, 30 measurements each, from scikit-learn; label 1 is benign; one in five validates.

    The split is stratified and fixed. Source of the data: the UCI Wisconsin diagnostic set, by ``load_breast_cancer``.
    """
    from sklearn import datasets, model_selection  # pyright: ignore[reportMissingTypeStubs]

    bunch = cast("Any", datasets).load_breast_cancer()
    rows, labels = bunch.data.astype(np.float32), bunch.target.astype(np.int64)
    split = cast("Any", model_selection).train_test_split
    train, val = split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    names = [str(name) for name in bunch.feature_names]
    return TabularData(rows[train], labels[train], rows[val], labels[val], names)


def enlarge(images: Any, size: int) -> Any:
    """Bilinear interpolation of square images, (samples, n, n) to (samples, size, size), pixel centres aligned."""
    n = images.shape[1]
    position = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.minimum(position.astype(int), n - 2)
    weights = np.zeros((size, n))
    weights[np.arange(size), low] = 1 - (position - low)
    weights[np.arange(size), low + 1] = position - low
    return weights @ images @ weights.T
