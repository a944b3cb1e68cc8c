"""Calibration images: counts, shares, seeds, normalisation, fingerprints, for every origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor

from datamodules.arrays import read_fashion_mnist
from datamodules.calibration import CalibrationSource, NoiseImages, RealImages, SyntheticImages
from datamodules.ledger import DataLedger
from networks.fingerprint import fingerprint
from networks.teachers import Teacher, load_teacher
from tests.configuration import composed, options


def small_teacher(channels: int, side: int, classes: int = 10, resize: int | None = None) -> Teacher:
    mean, std = [0.2860, 0.5, 0.4][:channels], [0.3530, 0.25, 0.2][:channels]
    size = [channels, side, side]
    return load_teacher(
        "resnet8", "random", num_classes=classes, input_size=size, mean=mean, std=std, resize=resize, name="small"
    )


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return small_teacher(1, 28)


@pytest.fixture
def ledger() -> DataLedger:
    return DataLedger(data_free=False)


def never(count: int) -> Tensor:
    raise AssertionError("this source must not make images")


def test_real_fashion_images_are_those_of_the_file(teacher: Teacher, ledger: DataLedger):
    got = RealImages("fashion_mnist", "", 40, 0).load(teacher, ledger, never)
    stored = read_fashion_mnist("train", "calibration", ledger)
    rows = [stored.index.tolist().index(position) for position in got.files or []]
    expected = (stored.pixels[rows].double() / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(got.images.double(), expected, rtol=0, atol=1e-6)
    assert got.labels is not None
    assert torch.equal(got.labels, stored.labels[rows])
    assert torch.bincount(got.labels).tolist() == [4] * 10
    assert (got.origin, got.digest, got.images.dtype) == ("real", fingerprint({"images": got.images}), torch.float32)
    assert [entry["count"] for entry in ledger.entries] == [40]
    assert ledger.entries[0]["digest"] == got.digest


def test_seeds_and_prefixes(teacher: Teacher, ledger: DataLedger):
    more, fewer = (RealImages("fashion_mnist", "", n, 3).load(teacher, ledger, never) for n in (64, 16))
    assert torch.equal(more.images[:16], fewer.images)
    again = RealImages("fashion_mnist", "", 16, 3).load(teacher, ledger, never)
    other = RealImages("fashion_mnist", "", 16, 4).load(teacher, ledger, never)
    assert again.digest == fewer.digest != other.digest


def test_too_many_names_the_maximum(teacher: Teacher, ledger: DataLedger):
    with pytest.raises(ValueError, match=r"calibration\.count: expected 1 to 1024 .*got 1025"):
        RealImages("fashion_mnist", "", 1025, 0).load(teacher, ledger, never)
    for source in (NoiseImages, SyntheticImages, RealImages):
        arguments: dict[str, Any] = {"count": 0, "seed": 0, "dataset": "", "root": ""}
        names = source.__init__.__annotations__
        with pytest.raises(ValueError, match=r"calibration\.count"):
            source(**{key: value for key, value in arguments.items() if key in names})


def test_what_does_not_fit_the_teacher_is_refused(ledger: DataLedger):
    with pytest.raises(ValueError, match="choose data that fits the model"):
        RealImages("fashion_mnist", "", 8, 0).load(small_teacher(3, 32), ledger, never)
    with pytest.raises(ValueError, match=r"calibration\.dataset: expected fashion_mnist"):
        RealImages("svhn", "", 8, 0).load(small_teacher(3, 32), ledger, never)
    with pytest.raises(ValueError, match="expected images of shape"):
        SyntheticImages(4).load(small_teacher(1, 28), ledger, lambda count: torch.zeros(count, 1, 14, 14))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three classes of four images each, of one grey level per image."""
    for level in range(12):
        path = tmp_path / "imagenet" / "calibration" / f"n{level // 4}" / f"{level}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((24, 30, 3), 20 * level, np.uint8)).save(path)
    return tmp_path


@pytest.mark.parametrize("whole_folder", [False, True])
def test_images_from_folders(folders: Path, ledger: DataLedger, whole_folder: bool):
    teacher = small_teacher(3, 16, classes=3, resize=20)
    folder = str(folders / "imagenet" / "calibration") if whole_folder else None
    got = RealImages("imagenet", str(folders), 6, 0, folder).load(teacher, ledger, never)
    assert got.images.shape == (6, 3, 16, 16)
    assert got.labels is not None
    assert torch.bincount(got.labels).tolist() == [2, 2, 2]
    for image, label, name in zip(got.images, got.labels.tolist(), got.files or [], strict=True):
        folder_name, level = str(name).removesuffix(".png").split("/")
        assert folder_name == f"n{label}"
        expected = (20 * int(level) / 255 - torch.tensor(teacher.mean)) / torch.tensor(teacher.std)
        torch.testing.assert_close(image.amax((1, 2)), expected)
        torch.testing.assert_close(image.amin((1, 2)), expected)
    incomplete = small_teacher(3, 16, classes=5, resize=20)
    other = RealImages("", "", 6, 0, str(folders / "imagenet" / "calibration")).load(incomplete, ledger, never)
    assert other.labels is None


def test_normal_noise(teacher: Teacher, ledger: DataLedger):
    got = NoiseImages(64, seed=0).load(teacher, ledger, never)
    assert got.images.shape == (64, 1, 28, 28)
    assert got.origin == "noise"
    assert abs(got.images.mean().item()) < 0.02
    assert abs(got.images.std().item() - 1) < 0.02
    assert NoiseImages(64, seed=1).load(teacher, ledger, never).digest != got.digest
    assert NoiseImages(64, seed=0).load(teacher, ledger, never).digest == got.digest
    assert ledger.entries == []


def test_uniform_noise_covers_the_valid_pixels(ledger: DataLedger):
    teacher = small_teacher(3, 32)
    images = NoiseImages(32, seed=0, distribution="uniform").load(teacher, ledger, never).images
    mean, std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    pixels = images * std.view(3, 1, 1) + mean.view(3, 1, 1)
    torch.testing.assert_close(pixels.amin((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(pixels.amax((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"calibration\.distribution"):
        NoiseImages(4, 0, "laplace")  # type: ignore[arg-type]


def test_synthetic_images_are_those_that_were_made(teacher: Teacher, ledger: DataLedger):
    made = torch.randn(5, 1, 28, 28, requires_grad=True)
    got = SyntheticImages(5).load(teacher, ledger, lambda count: made[:count])
    assert torch.equal(got.images, made.detach())
    assert not got.images.requires_grad
    assert (got.origin, got.files) == ("synthetic", None)


def test_smaller_sets_of_one_pool_are_part_of_the_larger(teacher: Teacher, ledger: DataLedger):
    asked: list[int] = []

    def make(count: int) -> Tensor:
        asked.append(count)
        return torch.arange(count).view(-1, 1, 1, 1).expand(count, 1, 28, 28).float()

    sets = [SyntheticImages(count, pool=7).load(teacher, ledger, make).images for count in (2, 5, 7)]
    assert asked == [7, 7, 7]
    assert [images[:, 0, 0, 0].tolist() for images in sets] == [list(range(count)) for count in (2, 5, 7)]
    with pytest.raises(ValueError, match=r"calibration\.pool: expected at least calibration\.count, 8, got 7"):
        SyntheticImages(8, pool=7)


@pytest.mark.parametrize("name", options("calibration"))
def test_every_configuration_loads(name: str, teacher: Teacher, ledger: DataLedger):
    config = composed([f"calibration={name}"]).calibration
    counted = {"count": 8} if "count" in config else {}
    source = instantiate(config, **counted)
    assert isinstance(source, CalibrationSource)
    got = source.load(teacher, ledger, lambda count: torch.zeros(count, 1, 28, 28))
    assert got.images.shape == (8 if counted else 0, 1, 28, 28)
    assert got.origin == name.split("_")[0] == source.origin
    assert (got.rule is not None) == (got.origin == "none")


@pytest.mark.data
def test_real_cifar_images(data_root: Path, ledger: DataLedger):
    got = RealImages("cifar10", str(data_root), 100, 0).load(small_teacher(3, 32), ledger, never)
    assert got.labels is not None
    assert torch.bincount(got.labels).tolist() == [10] * 10
    assert got.images.shape == (100, 3, 32, 32)
