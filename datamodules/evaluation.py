"""Labelled images on which networks are scored: Fashion-MNIST (embedded), CIFAR-10/100, ImageNet folders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.arrays import LabelledPixels, find_cifar, read_cifar, read_fashion_mnist
from datamodules.folders import FolderDataset, find_imagenet
from datamodules.ledger import EVALUATION, DataLedger
from datamodules.preprocessing import normalize, pixel_transform
from datamodules.selection import evenly_spaced
from networks.fingerprint import fingerprint


class BatchSlices(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches cut from tensors in memory; nothing is done image by image."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.images = images.split(batch_size)
        self.labels = labels.split(batch_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class EvaluationData(LightningDataModule, ABC):
    """A test set: `load` it with the run's ledger, then test on it.

    Attributes:
        name: of the data.
        split: of the data.
        count: images used, after `limit`.
        digest: fingerprint of what is used.
        files: paths, or positions in the original split.
        pixel_size: (C, H, W) of the stored images where all are alike, else None.
    """

    name: str
    split: str
    count: int
    digest: str
    files: list[str] | list[int]
    pixel_size: tuple[int, int, int] | None = None

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: Sequence[int],
        num_classes: int,
        batch_size: int,
        limit: int | None = None,
    ) -> None:
        """Keep the choices; nothing is read.

        Args:
            mean: of the model's normalisation.
            std: the same.
            input_size: (C, H, W) of the model.
            num_classes: of the model.
            batch_size: of the loader.
            limit: use only that many images, evenly spaced over the set.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size: expected at least 1, got {batch_size}")
        self.mean, self.std = tuple(mean), tuple(std)
        self.input_size = tuple(input_size)
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.limit = limit
        self.dataset: Dataset[tuple[Tensor, Tensor]] | None = None

    def expect(self) -> None:
        """Check, before hours of work and without opening an image, that the files are there and fit the model.

        Raises:
            ValueError: naming what is missing or does not fit.
        """
        if self.pixel_size is not None and self.pixel_size != self.input_size:
            raise ValueError(
                f"model.input_size: images of {self.name} are {self.pixel_size}, the model takes {self.input_size}; "
                "choose data that fits the model (data=...)"
            )

    @abstractmethod
    def load(self, ledger: DataLedger) -> Self:
        """Find or read the images, enter them into the ledger, and return this object.

        Raises:
            ValueError: if files are missing or do not fit the model.
        """

    def setup(self, stage: str) -> None:
        """Lightning's hook; refuses data that no ledger knows of."""
        if self.dataset is None:
            raise RuntimeError(f"{type(self).__name__}: call load(ledger) before testing on it")

    def _keep_in_memory(self, stored: LabelledPixels, ledger: DataLedger) -> None:
        if tuple(stored.pixels.shape[1:]) != self.input_size:
            raise ValueError(
                f"model.input_size: images of {self.name} are {tuple(stored.pixels.shape[1:])}, the model takes "
                f"{self.input_size}; choose data that fits the model"
            )
        chosen = evenly_spaced(len(stored.labels), self.limit)
        pixels, labels = stored.pixels[chosen], stored.labels[chosen]
        if int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"model.num_classes: {self.name} has the label {int(labels.max())}, the model {self.num_classes} "
                "classes; choose data that fits the model"
            )
        self.dataset = BatchSlices(normalize(pixels, self.mean, self.std), labels, self.batch_size)
        self.files = stored.index[chosen].tolist()
        self._enter(fingerprint({"pixels": pixels, "labels": labels}), ledger)

    def _enter(self, digest: str, ledger: DataLedger) -> None:
        self.count, self.digest = len(self.files), digest
        ledger.opened(EVALUATION, self.name, self.split, self.count, digest)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of images, (B, C, H, W) normalised float32, and labels, (B,), always in the same order."""
        self.setup("test")
        assert self.dataset is not None
        return DataLoader(self.dataset, batch_size=None)


class FashionMNIST(EvaluationData):
    """The 10,000 test images, embedded in this package."""

    name, split = "fashion_mnist", "test"
    pixel_size = (1, 28, 28)

    def load(self, ledger: DataLedger) -> Self:
        self._keep_in_memory(read_fashion_mnist("test", EVALUATION, ledger), ledger)
        return self


class CIFAR(EvaluationData):
    """The 10,000 test images of CIFAR-10 or CIFAR-100.

    Args:
        root: folder with `cifar10/` or `cifar100/`.
        classes: 10 or 100.
        choices: as in `EvaluationData`.
    """

    split = "test"
    pixel_size = (3, 32, 32)

    def __init__(self, root: str, classes: int, **choices: Any) -> None:
        super().__init__(**choices)
        self.root = root
        self.classes = classes
        self.name = f"cifar{classes}"

    def expect(self) -> None:
        super().expect()
        find_cifar(self.root, self.classes, "test")

    def load(self, ledger: DataLedger) -> Self:
        self._keep_in_memory(read_cifar(self.root, self.classes, "test", EVALUATION, ledger), ledger)
        return self


class ImageNet(EvaluationData):
    """Images in `<root>/imagenet/validation/<wnid>/` (or `val/`), decoded by worker processes as they are needed.

    Args:
        root: folder with `imagenet/`.
        resize: short side before the centre crop.
        interpolation: of that resize.
        num_workers: processes that decode; 0: the main one.
        choices: as in `EvaluationData`.
    """

    name, split = "imagenet", "validation"

    def __init__(
        self, root: str, resize: int | None, interpolation: str = "bilinear", num_workers: int = 0, **choices: Any
    ) -> None:
        super().__init__(**choices)
        self.root = root
        self.transform = pixel_transform(self.input_size, resize, interpolation)
        self.num_workers = num_workers

    def expect(self) -> None:
        super().expect()
        find_imagenet(self.root, self.num_classes, self.split, EVALUATION, DataLedger(data_free=True))

    def load(self, ledger: DataLedger) -> Self:
        found = find_imagenet(self.root, self.num_classes, self.split, EVALUATION, ledger)
        images = found.select(evenly_spaced(len(found.files), self.limit))
        self.dataset = FolderDataset(images, self.transform, self.mean, self.std)
        self.files = images.files
        self._enter(images.digest(), ledger)
        return self

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches as in `EvaluationData`."""
        self.setup("test")
        assert self.dataset is not None
        return DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
