"""Images in folders: one folder a class, class numbers from the sorted names of all classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.ledger import DataLedger
from datamodules.preprocessing import normalize
from networks.fingerprint import DIGITS

CLASS_FOLDERS = ("calibration", "train")
VALIDATION_FOLDERS = ("validation", "val")
IMAGENET_LAYOUT = "one folder of images for each class, named by its wnid (n01440764, ...)"


class ImageFiles(NamedTuple):
    """Images on disk.

    Attributes:
        folder: what `files` are relative to.
        files: paths with forward slashes, sorted.
        labels: (N,) int64, or None where the images do not lie in class folders.
    """

    folder: Path
    files: list[str]
    labels: Tensor | None

    def digest(self) -> str:
        """Hash of names and sizes: reading the bytes of 50,000 images would take longer than scoring them."""
        lines = [f"{name} {(self.folder / name).stat().st_size}" for name in self.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGITS]

    def select(self, index: Tensor) -> ImageFiles:
        """Those at the given positions, in that order."""
        labels = None if self.labels is None else self.labels[index]
        return ImageFiles(self.folder, [self.files[i] for i in index.tolist()], labels)


def find_imagenet(root: str | Path, num_classes: int, split: str, stage: str, ledger: DataLedger) -> ImageFiles:
    """Images of `<root>/imagenet/<split>/<wnid>/`; a class's number is its place among all sorted wnids.

    All wnids are the folder names of `calibration/` or `train/`, or of the split itself where it has them all: a
    sample that lacks classes must not number only those it has.

    Args:
        root: folder that holds `imagenet/`.
        num_classes: how many wnids there must be.
        split: "validation" (also found as `val`) or "calibration" (also found as `train`).
        stage: for the ledger.
        ledger: asked before anything is listed.

    Raises:
        ValueError: if a folder is missing, or the wnids are not as many as the model has classes.
        RuntimeError: if the ledger refuses.
    """
    ledger.permit(stage, "imagenet", split)
    base = Path(root).expanduser() / "imagenet"
    names = VALIDATION_FOLDERS if split == "validation" else CLASS_FOLDERS
    folder = next((base / name for name in names if (base / name).is_dir()), None)
    if folder is None:
        raise ValueError(
            f"paths.data: no folder {' or '.join(str(base / name) for name in names)}; expected {IMAGENET_LAYOUT}. Set "
            "CALIBRANT_DATA or paths.data to the folder with imagenet/; image-net.org (ILSVRC 2012) has the images"
        )
    wnids = _all_wnids(base, folder, num_classes)
    found = _list(folder)
    labels = []
    for name in found:
        wnid = name.split("/")[0]
        if wnid not in wnids:
            raise ValueError(f"{folder}: {wnid} is not among the {num_classes} classes; expected {IMAGENET_LAYOUT}")
        labels.append(wnids[wnid])
    return ImageFiles(folder, found, torch.tensor(labels))


def find_images(folder: str | Path, stage: str, ledger: DataLedger) -> ImageFiles:
    """All images below a folder; sub-folders, where every image lies in one, are the classes.

    Raises:
        ValueError: if there are none.
        RuntimeError: if the ledger refuses.
    """
    folder = Path(folder).expanduser()
    ledger.permit(stage, folder.name, "folder")
    if not folder.is_dir():
        raise ValueError(f"calibration.folder: no folder {folder}")
    files = _list(folder)
    if not all("/" in name for name in files):
        return ImageFiles(folder, files, None)
    classes = sorted({name.split("/")[0] for name in files})
    return ImageFiles(folder, files, torch.tensor([classes.index(name.split("/")[0]) for name in files]))


def _all_wnids(base: Path, folder: Path, num_classes: int) -> dict[str, int]:
    counts = []
    for candidate in (*(base / name for name in CLASS_FOLDERS), folder):
        if candidate.is_dir():
            wnids = sorted(entry.name for entry in candidate.iterdir() if entry.is_dir())
            if len(wnids) == num_classes:
                return {wnid: number for number, wnid in enumerate(wnids)}
            counts.append(f"{candidate} has {len(wnids)}")
    raise ValueError(
        f"model.num_classes: the model has {num_classes} classes, but {', '.join(counts)}; class numbers need a folder "
        f"with all of them: {base / 'calibration'} or {base / 'train'} ({IMAGENET_LAYOUT})"
    )


def _list(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if not names:
        raise ValueError(f"{folder}: no images ({', '.join(IMG_EXTENSIONS)})")
    return names


class FolderDataset(Dataset[tuple[Tensor, Tensor]]):
    """Decodes, resizes, crops and normalises one image at a time.

    Args:
        images: the files; unlabelled ones get the label -1.
        transform: PIL image to bytes (C, H, W).
        mean: of the normalisation.
        std: the same.
    """

    def __init__(
        self,
        images: ImageFiles,
        transform: Callable[[Image.Image], Tensor],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.images = images
        self.transform = transform
        self.mean = tuple(mean)
        self.std = tuple(std)
        count = len(images.files)
        self.labels = images.labels if images.labels is not None else torch.full((count,), -1)

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.images.folder / self.images.files[index]
        try:
            with Image.open(path) as image:
                pixels = self.transform(image.convert("L" if len(self.mean) == 1 else "RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path}: cannot be decoded ({error}); remove it or fetch it again") from error
        return normalize(pixels, self.mean, self.std), self.labels[index]
