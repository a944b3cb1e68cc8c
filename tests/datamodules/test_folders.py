"""Images in folders: class numbers, decoding, and what is said when files are missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from datamodules.folders import FolderDataset, find_imagenet, find_images
from datamodules.ledger import DataLedger
from datamodules.preprocessing import pixel_transform

WNIDS = ["n01", "n02", "n03", "n04"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(path: Path, seed: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four classes, one calibration image each; validation images for the second and the fourth only."""
    for seed, wnid in enumerate(WNIDS):
        picture(tmp_path / "imagenet" / "calibration" / wnid / f"{wnid}_0.JPEG", seed)
    for seed, name in enumerate(["n04/b.jpg", "n02/a.png", "n04/a.jpg"]):
        picture(tmp_path / "imagenet" / "validation" / name, 10 + seed)
    return tmp_path


@pytest.fixture
def ledger() -> DataLedger:
    return DataLedger(data_free=False)


def test_class_numbers_are_places_among_all_wnids(root: Path, ledger: DataLedger):
    found = find_imagenet(root, 4, "validation", "evaluation", ledger)
    assert found.files == ["n02/a.png", "n04/a.jpg", "n04/b.jpg"]
    assert found.labels is not None
    assert found.labels.tolist() == [1, 3, 3]


def test_a_complete_validation_folder_needs_nothing_else(root: Path, ledger: DataLedger):
    (root / "imagenet" / "validation").rename(root / "imagenet" / "spare")
    (root / "imagenet" / "calibration").rename(root / "imagenet" / "val")
    found = find_imagenet(root, 4, "validation", "evaluation", ledger)
    reference = ImageFolder(str(root / "imagenet" / "val"))
    assert found.labels is not None
    assert found.labels.tolist() == reference.targets


def test_missing_and_wrong_folders_are_named(root: Path, ledger: DataLedger):
    with pytest.raises(ValueError, match=r"no folder .*validation or .*val; expected one folder.*image-net\.org"):
        find_imagenet(root / "elsewhere", 4, "validation", "evaluation", ledger)
    with pytest.raises(ValueError, match=r"5 classes, but .*calibration has 4, .*validation has 2"):
        find_imagenet(root, 5, "validation", "evaluation", ledger)
    picture(root / "imagenet" / "validation" / "n99" / "a.jpg")
    with pytest.raises(ValueError, match="n99 is not among the 4 classes"):
        find_imagenet(root, 4, "validation", "evaluation", ledger)
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        find_images(root / "empty", "calibration", ledger)


def test_any_folder_labels_only_what_lies_in_class_folders(root: Path, ledger: DataLedger):
    nested = find_images(root / "imagenet" / "calibration", "calibration", ledger)
    assert nested.labels is not None
    assert nested.labels.tolist() == [0, 1, 2, 3]
    picture(root / "imagenet" / "calibration" / "loose.jpg")
    assert find_images(root / "imagenet" / "calibration", "calibration", ledger).labels is None


def test_decoding_equals_torchvisions(root: Path, ledger: DataLedger):
    found = find_imagenet(root, 4, "calibration", "calibration", ledger)
    ours = FolderDataset(found, pixel_transform((3, 12, 12), 16), MEAN, STD)
    steps = [transforms.Resize(16), transforms.CenterCrop(12), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    reference = ImageFolder(str(root / "imagenet" / "calibration"), transforms.Compose(steps))
    assert len(ours) == len(reference) == 4
    for i in range(4):
        torch.testing.assert_close(ours[i][0], reference[i][0], rtol=0, atol=1e-6)
        assert ours[i][1] == reference[i][1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_every_colour_mode_becomes_what_the_model_takes(tmp_path: Path, ledger: DataLedger, mode: str):
    picture(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"), mode=mode)
    found = find_images(tmp_path, "calibration", ledger)
    for channels in (1, 3):
        dataset = FolderDataset(found, pixel_transform((channels, 8, 8), 8), MEAN[:channels], STD[:channels])
        assert dataset[0][0].shape == (channels, 8, 8)


def test_a_broken_image_is_named(tmp_path: Path, ledger: DataLedger):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    found = find_images(tmp_path, "calibration", ledger)
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be decoded"):
        FolderDataset(found, pixel_transform((3, 8, 8), 8), MEAN, STD)[0]


def test_digest_changes_with_the_files(root: Path, ledger: DataLedger):
    before = find_imagenet(root, 4, "validation", "evaluation", ledger)
    digest = before.digest()
    assert digest == find_imagenet(root, 4, "validation", "evaluation", ledger).digest()
    assert digest != before.select(torch.tensor([0, 1])).digest()
    with (root / "imagenet" / "validation" / "n04" / "a.jpg").open("ab") as file:
        file.write(b"0")
    assert digest != find_imagenet(root, 4, "validation", "evaluation", ledger).digest()


@pytest.mark.data
def test_real_sample_has_1000_images_numbered_among_1000_wnids(data_root: Path, ledger: DataLedger):
    found = find_imagenet(data_root, 1000, "validation", "evaluation", ledger)
    wnids = sorted(path.name for path in (data_root / "imagenet" / "calibration").iterdir())
    assert len(found.files) == 1000
    assert found.labels is not None
    for name, label in zip(found.files, found.labels.tolist(), strict=True):
        assert wnids[label] == name.split("/")[0]
    assert len(found.labels.unique()) == 430
