"""Handwritten digits for the demo: scikit-learn's images of 8x8 pixels, or MNIST's IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CLASSES = 10
SPLIT_SEED = 0

# Of scikit-learn's 1797 digits. The demo's batches, up to x64, divide 1024.
TRAIN, TEST = 1024, 400


@dataclass(frozen=True)
class Part:
    """Images and their labels. A model reads the rows of an image one after another, as time steps."""

    images: Tensor  # (count, rows, columns), float32 in [0, 1]
    labels: Tensor  # (count,), int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Part:
        return Part(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> Part:
        return Part(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Digits:
    """The split, which is the same in every run."""

    train: Part
    validation: Part  # the recipe is chosen on it
    test: Part  # only the recorded runs read it

    def to(self, device: torch.device) -> Digits:
        return Digits(self.train.to(device), self.validation.to(device), self.test.to(device))


def _shuffled(part: Part) -> Part:
    return part[torch.randperm(len(part), generator=torch.Generator().manual_seed(SPLIT_SEED))]


def load_sklearn() -> Digits:
    """The 1797 digits that come with scikit-learn: the test part of UCI's optical recognition data."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = torch.tensor(bunch.images, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.int64)
    part = _shuffled(Part(images, labels))
    return Digits(part[:TRAIN], part[TRAIN:-TEST], part[-TEST:])


def load_mnist(folder: Path) -> Digits:
    """MNIST's four IDX files, plain or gzipped. A twelfth of the training file, 5,000 of 60,000 images, validates.

    Raises:
        FileNotFoundError: with the name of the missing file.
        ValueError: with the name of the malformed file.
    """
    parts = {name: _read_part(folder, name) for name in ("train", "t10k")}
    shapes = {name: tuple(part.images.shape[1:]) for name, part in parts.items()}
    if shapes["train"] != shapes["t10k"]:
        raise ValueError(f"{folder}: training images are {shapes['train']}, test images {shapes['t10k']}")
    train = _shuffled(parts["train"])
    held_out = math.ceil(len(train) / 12)
    return Digits(train[held_out:], train[:held_out], parts["t10k"])


def _read_part(folder: Path, name: str) -> Part:
    images_file, labels_file = (_find(folder, f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_file, dimensions=3), read_idx(labels_file, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{images_file} holds {len(images)} images, {labels_file} {len(labels)} labels")
    if labels.max() >= CLASSES:
        raise ValueError(f"{labels_file}: labels must be 0 to {CLASSES - 1}, got {labels.max()}")
    return Part(images.float() / 255, labels.long())


def _find(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder / name} (or .gz) is missing")


def read_idx(file: Path, dimensions: int) -> Tensor:
    """The uint8 tensor of an IDX file.

    The file holds two zero bytes, the type 8, the number of dimensions, their sizes as big-endian integers, the data.
    """
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: not a whole gzip file: {error}") from error
    start = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if data[:4] != magic or len(data) < start:
        raise ValueError(
            f"{file}: not an IDX file of bytes in {dimensions} dimension(s): "
            f"it must start with {magic.hex(' ')}, got {data[:4].hex(' ') or 'nothing'} in {len(data)} bytes"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if 0 in shape or len(data) - start != math.prod(shape):
        raise ValueError(f"{file}: header says {shape}, {math.prod(shape)} bytes; {len(data) - start} follow it")
    return torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8).reshape(shape)
