"""Where calibration images come from: the teacher itself (synthetic), a few real images, noise, or nowhere.

Every source is asked in the same way, `source.load(teacher, ledger, make)`; only the synthetic one calls `make`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from datamodules.arrays import LabelledPixels, read_cifar, read_fashion_mnist
from datamodules.folders import FolderDataset, ImageFiles, find_imagenet, find_images
from datamodules.ledger import DataLedger
from datamodules.preprocessing import normalize, pixel_transform
from datamodules.selection import stratified
from networks.fingerprint import fingerprint
from networks.teachers import Teacher
from synthesis.analytic_ranges import AnalyticRange

Origin = Literal["synthetic", "real", "noise", "none"]
STAGE = "calibration"


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationImages:
    """Images as the teacher takes them, and where they are from.

    Attributes:
        images: (N, C, H, W) normalised float32 on the CPU.
        origin: "synthetic", "real", "noise" or "none".
        digest: fingerprint of `images`.
        labels: (N,) int64 in the teacher's numbering, where known.
        files: which real images: paths, or positions in the training set.
        rule: where there are no images, how ranges follow from moments.
    """

    images: Tensor
    origin: Origin
    digest: str
    labels: Tensor | None = None
    files: list[str] | list[int] | None = None
    rule: AnalyticRange | None = None


class CalibrationSource(ABC):
    """A choice of calibration images; `origin` says whether a run with it is data-free."""

    origin: ClassVar[Origin]

    @abstractmethod
    def load(self, teacher: Teacher, ledger: DataLedger, make: Callable[[int], Tensor]) -> CalibrationImages:
        """Get the images.

        Args:
            teacher: says size and normalisation.
            ledger: told of real images before they are opened.
            make: given a count, makes that many images, (count, C, H, W), in the teacher's normalised space.

        Raises:
            ValueError: if there are not that many, or they do not fit the teacher.
        """


class SyntheticImages(CalibrationSource):
    """Images made from the teacher alone.

    Args:
        count: how many.
        pool: how many are made, of which the first `count` are taken: sets of several sizes then share one synthesis,
            and the smaller are part of the larger, as they are of real images. None: `count`.

    Raises:
        ValueError: if `pool` is smaller than `count`.
    """

    origin = "synthetic"

    def __init__(self, count: int, pool: int | None = None) -> None:
        self.count = _positive(count)
        self.pool = self.count if pool is None else pool
        if self.pool < count:
            raise ValueError(f"calibration.pool: expected at least calibration.count, {count}, got {pool}")

    def load(self, teacher: Teacher, ledger: DataLedger, make: Callable[[int], Tensor]) -> CalibrationImages:
        images = make(self.pool).detach().to("cpu", torch.float32)
        expected = (self.pool, *teacher.input_size)
        if tuple(images.shape) != expected:
            raise ValueError(f"synthesis: expected images of shape {expected}, got {tuple(images.shape)}")
        images = images[: self.count].clone()
        return CalibrationImages(images=images, origin=self.origin, digest=fingerprint({"images": images}))


class NoiseImages(CalibrationSource):
    """Independent noise in every pixel: what any method must beat.

    Args:
        count: how many.
        seed: of the noise.
        distribution: "normal": N(0, 1) in the normalised space; "uniform": uniform over the valid pixels.
    """

    origin = "noise"

    def __init__(self, count: int, seed: int, distribution: Literal["normal", "uniform"] = "normal") -> None:
        if distribution not in ("normal", "uniform"):
            raise ValueError(f"calibration.distribution: expected normal or uniform, got {distribution!r}")
        self.count = _positive(count)
        self.seed = seed
        self.distribution = distribution

    def load(self, teacher: Teacher, ledger: DataLedger, make: Callable[[int], Tensor]) -> CalibrationImages:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.count, *teacher.input_size)
        if self.distribution == "normal":
            images = torch.randn(shape, generator=generator)
        else:
            pixels = torch.rand(shape, generator=generator) * 255
            images = normalize(pixels, teacher.mean, teacher.std)
        return CalibrationImages(images=images, origin=self.origin, digest=fingerprint({"images": images}))


class NoImages(CalibrationSource):
    """No images at all: ranges come from stored or propagated moments, and nothing can be reconstructed.

    Args:
        rule: from the moments of a tensor to its range.
        count: none whatever it says, since a preset may state one for all sources (debug=default).
    """

    origin = "none"

    def __init__(self, rule: AnalyticRange, count: int = 0) -> None:
        self.rule = rule

    def load(self, teacher: Teacher, ledger: DataLedger, make: Callable[[int], Tensor]) -> CalibrationImages:
        images = torch.zeros(0, *teacher.input_size)
        return CalibrationImages(images=images, origin=self.origin, digest="", rule=self.rule)


class RealImages(CalibrationSource):
    """A few real training images, the same number of every class.

    Args:
        dataset: "fashion_mnist" (embedded, at most 1,024), "cifar10", "cifar100" or "imagenet".
        root: folder with `cifar10/`, `cifar100/` or `imagenet/`.
        count: how many; with one seed, fewer are a prefix of more.
        seed: of the choice.
        folder: any folder of images to use instead of the dataset.
    """

    origin = "real"

    def __init__(self, dataset: str, root: str, count: int, seed: int, folder: str | None = None) -> None:
        self.dataset = dataset
        self.root = root
        self.count = _positive(count)
        self.seed = seed
        self.folder = folder

    def load(self, teacher: Teacher, ledger: DataLedger, make: Callable[[int], Tensor]) -> CalibrationImages:
        if self.folder is not None:
            files = find_images(self.folder, STAGE, ledger)
            return self._from_files(files, files.folder.name, teacher, ledger)
        if self.dataset == "imagenet":
            files = find_imagenet(self.root, teacher.num_classes, "calibration", STAGE, ledger)
            return self._from_files(files, "imagenet", teacher, ledger)
        if self.dataset == "fashion_mnist":
            return self._from_pixels(read_fashion_mnist("train", STAGE, ledger), teacher, ledger)
        if self.dataset in ("cifar10", "cifar100"):
            classes = int(self.dataset.removeprefix("cifar"))
            return self._from_pixels(read_cifar(self.root, classes, "train", STAGE, ledger), teacher, ledger)
        raise ValueError(
            "calibration.dataset: expected fashion_mnist, cifar10, cifar100 or imagenet, "
            f"got {self.dataset!r}; or set calibration.folder=<any folder of images>"
        )

    def _from_pixels(self, stored: LabelledPixels, teacher: Teacher, ledger: DataLedger) -> CalibrationImages:
        if tuple(stored.pixels.shape[1:]) != teacher.input_size:
            raise ValueError(
                f"calibration.dataset: images of {self.dataset} are {tuple(stored.pixels.shape[1:])}, "
                f"{teacher.name} takes {teacher.input_size}; choose data that fits the model"
            )
        chosen = stratified(stored.labels, self.count, self.seed)
        images = normalize(stored.pixels[chosen], teacher.mean, teacher.std)
        digest = fingerprint({"images": images})
        ledger.opened(STAGE, self.dataset, "train", len(images), digest)
        index = stored.index[chosen].tolist()
        return CalibrationImages(
            images=images, origin=self.origin, digest=digest, labels=stored.labels[chosen], files=index
        )

    def _from_files(self, found: ImageFiles, name: str, teacher: Teacher, ledger: DataLedger) -> CalibrationImages:
        labels = found.labels if found.labels is not None else torch.zeros(len(found.files), dtype=torch.int64)
        chosen = found.select(stratified(labels, self.count, self.seed))
        transform = pixel_transform(teacher.input_size, teacher.resize, teacher.interpolation)
        dataset = FolderDataset(chosen, transform, teacher.mean, teacher.std)
        images = torch.stack([dataset[i][0] for i in range(len(dataset))])
        digest = fingerprint({"images": images})
        ledger.opened(STAGE, name, found.folder.name, len(images), digest)
        # A folder that lacks classes numbers the rest differently from the teacher.
        complete = found.labels is not None and len(found.labels.unique()) == teacher.num_classes
        return CalibrationImages(
            images=images,
            origin=self.origin,
            digest=digest,
            labels=chosen.labels if complete else None,
            files=chosen.files,
        )


def _positive(count: int) -> int:
    if count < 1:
        raise ValueError(f"calibration.count: expected at least 1, got {count}")
    return count
