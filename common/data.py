"""Real data that ships with scikit-learn, shaped like the data sets it stands for. Nothing is downloaded."""

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import numpy as np


@dataclass(frozen=True)
class ImageData:
    """Images and labels, split for training and validation.

    Attributes:
        train_images, val_images: uint8, (samples, height, width) or (samples, height, width, channels), 0..255.
        train_labels, val_labels: int64, (samples,).
        fingerprint: hash of all of it; part of a training's configuration.
    """

    train_images: Any
    train_labels: Any
    val_images: Any
    val_labels: Any

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
