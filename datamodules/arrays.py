"""Small images that come as one array: the embedded Fashion-MNIST sample, and CIFAR as npz or as torchvision has it."""

from __future__ import annotations

import zipfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from datamodules.ledger import DataLedger

Split = Literal["train", "test"]
CIFAR_FILES: dict[str, str] = {"test": "test.npz", "train": "train_subset.npz"}
TORCHVISION_CIFAR = {
    10: (datasets.CIFAR10, "cifar-10-batches-py"),
    100: (datasets.CIFAR100, "cifar-100-python"),
}


class LabelledPixels(NamedTuple):
    """Images as they are stored.

    Attributes:
        pixels: (N, C, H, W) uint8.
        labels: (N,) int64.
        index: (N,) int64, position of each image in the original split.
    """

    pixels: Tensor
    labels: Tensor
    index: Tensor


def read_fashion_mnist(split: Split, stage: str, ledger: DataLedger) -> LabelledPixels:
    """The embedded sample of Fashion-MNIST: all 10,000 test images, or 1,024 training images.

    Raises:
        RuntimeError: if the ledger refuses.
    """
    ledger.permit(stage, "fashion_mnist", split)
    name = "test.npz" if split == "test" else "train_1024.npz"
    return _read_npz(resources.files("datamodules") / "fashion_mnist" / name)


def find_cifar(root: str | Path, classes: int, split: Split) -> Path:
    """The npz file of a split, or the folder that torchvision's own files stand in; no image is opened.

    Raises:
        ValueError: if `classes` is neither 10 nor 100, or nothing is found; says what is expected where.
    """
    if classes not in TORCHVISION_CIFAR:
        raise ValueError(
            f"model.num_classes: expected 10 or 100 for CIFAR, got {classes}; choose data that fits the model"
        )
    name = f"cifar{classes}"
    folder = Path(root).expanduser() / name
    file = folder / CIFAR_FILES[split]
    if file.is_file():
        return file
    dataset, own_folder = TORCHVISION_CIFAR[classes]
    for place in (folder, folder.parent):
        if (place / own_folder).is_dir():
            return place
    raise ValueError(
        f"paths.data: neither {file} nor {folder / own_folder} is there; set CALIBRANT_DATA or paths.data to the "
        f"folder with {name}/; torchvision.datasets.{dataset.__name__}({str(folder)!r}, download=True) gets the images"
    )


def read_cifar(root: str | Path, classes: int, split: Split, stage: str, ledger: DataLedger) -> LabelledPixels:
    """CIFAR-10 or CIFAR-100 from `<root>/cifar10/test.npz` and `train_subset.npz`, or from torchvision's own files.

    The npz files hold `x`, (N, 32, 32, 3) uint8, `y`, (N,), and optionally `index`, (N,).

    Raises:
        ValueError: as `find_cifar`.
        RuntimeError: if the ledger refuses.
    """
    ledger.permit(stage, f"cifar{classes}", split)
    place = find_cifar(root, classes, split)
    if place.is_file():
        return _read_npz(place)
    stored = TORCHVISION_CIFAR[classes][0](str(place), train=split == "train")
    pixels = torch.from_numpy(stored.data).permute(0, 3, 1, 2)
    return LabelledPixels(pixels, torch.tensor(stored.targets), torch.arange(len(pixels)))


def _read_npz(file: Traversable | Path) -> LabelledPixels:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            pixels = torch.from_numpy(archive["x"])
            labels = torch.from_numpy(archive["y"].astype(np.int64))
            index = torch.from_numpy(archive["index"]) if "index" in archive else torch.arange(len(labels))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file}: expected arrays x (N, H, W[, C]) uint8 and y (N,) in an npz file; {error}"
        ) from error
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or len(pixels) != len(labels):
        raise ValueError(
            f"{file}: expected x (N, H, W[, C]) uint8 and as many labels, got {pixels.dtype} {tuple(pixels.shape)} "
            f"and {len(labels)} labels"
        )
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return LabelledPixels(pixels.contiguous(), labels, index.long())
