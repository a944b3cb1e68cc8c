"""Test sets: order, normalisation, limits, fingerprints, and float accuracies that others have published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from datamodules.arrays import read_fashion_mnist
from datamodules.evaluation import CIFAR, EvaluationData, FashionMNIST, ImageNet
from datamodules.ledger import DataLedger
from networks.teachers import load_teacher

CONF = Path(__file__).parents[2] / "conf"
FASHION: dict[str, Any] = {"mean": [0.2860], "std": [0.3530], "input_size": [1, 28, 28], "num_classes": 10}
COLOUR: dict[str, Any] = {
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "input_size": [3, 32, 32],
    "num_classes": 10,
}


@pytest.fixture
def ledger() -> DataLedger:
    return DataLedger(data_free=True)


def test_batches_equal_a_plain_loader(ledger: DataLedger):
    data = FashionMNIST(**FASHION, batch_size=64, limit=150).load(ledger)
    stored = read_fashion_mnist("test", "evaluation", ledger)
    chosen = [i * 10_000 // 150 for i in range(150)]
    pixels = (stored.pixels[chosen].double() / 255 - 0.2860) / 0.3530
    plain = DataLoader(TensorDataset(pixels, stored.labels[chosen]), batch_size=64)
    ours = list(data.test_dataloader())
    assert [len(labels) for _, labels in ours] == [64, 64, 22]
    for (images, labels), (expected, targets) in zip(ours, plain, strict=True):
        assert images.dtype == torch.float32
        torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(labels, targets)
    assert (data.count, data.files, data.name) == (150, chosen, "fashion_mnist")


def test_digest_follows_what_is_used(ledger: DataLedger):
    digests = [
        FashionMNIST(**FASHION, batch_size=b, limit=n).load(ledger).digest for b, n in [(8, 64), (16, 64), (8, 65)]
    ]
    assert digests[0] == digests[1] != digests[2]
    assert [entry["digest"] for entry in ledger.entries] == digests


def test_data_that_does_not_fit_is_refused(ledger: DataLedger, tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.input_size.*fits the model"):
        FashionMNIST(**COLOUR, batch_size=8).load(ledger)
    with pytest.raises(ValueError, match=r"model\.num_classes.*fits the model"):
        FashionMNIST(**{**FASHION, "num_classes": 5}, batch_size=8).load(ledger)
    with pytest.raises(ValueError, match=r"data\.batch_size"):
        FashionMNIST(**FASHION, batch_size=0)
    with pytest.raises(ValueError, match=r"data\.limit"):
        FashionMNIST(**FASHION, batch_size=8, limit=0).load(ledger)
    with pytest.raises(ValueError, match="neither"):
        CIFAR(str(tmp_path), 10, **COLOUR, batch_size=8).load(ledger)
    with pytest.raises(ValueError, match="no folder"):
        ImageNet(str(tmp_path), 40, **COLOUR, batch_size=8).load(ledger)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two CIFAR images and two ImageNet classes, the first with two validation images."""
    (tmp_path / "cifar10").mkdir()
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10" / "test.npz", x=x, y=np.array([7, 2]))
    for name in ("calibration/n0/0.png", "calibration/n1/0.png", "validation/n1/a.png", "validation/n1/b.png"):
        path = tmp_path / "imagenet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[0]).resize((60, 50)).save(path)
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_folders_batch_and_record(root: Path, ledger: DataLedger, num_workers: int):
    two = {**COLOUR, "num_classes": 2}
    data = ImageNet(str(root), 40, num_workers=num_workers, **two, batch_size=8).load(ledger)
    ((images, labels),) = list(data.test_dataloader())
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [1, 1]
    assert data.files == ["n1/a.png", "n1/b.png"]
    assert ledger.entries[0]["digest"] == data.digest


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "data").glob("*.yaml")))
def test_every_configuration_loads(name: str, root: Path, ledger: DataLedger):
    (root / "cifar100").symlink_to(root / "cifar10")
    model = {**(FASHION if name == "fashion_mnist" else COLOUR), "resize": 40, "interpolation": "bilinear"}
    if name == "imagenet":
        model["num_classes"] = 2
    whole = {"paths": {"data": str(root)}, "model": model, "data": OmegaConf.load(CONF / "data" / f"{name}.yaml")}
    config = OmegaConf.create(whole)
    OmegaConf.set_struct(config, True)
    config.data.limit = 2
    if name == "imagenet":
        config.data.num_workers = 0
    data = instantiate(config.data)
    assert isinstance(data, EvaluationData)
    assert data.load(ledger).name == name
    assert sum(len(labels) for _, labels in data.test_dataloader()) == data.count == 2


def accuracy(network: torch.nn.Module, data: EvaluationData) -> float:
    with torch.inference_mode():
        hits = sum((network(x).argmax(1) == y).sum().item() for x, y in data.test_dataloader())
    return 100 * hits / data.count


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("depth", "stated"), [(20, 91.73), (32, 92.63), (56, 93.39)])
def test_cifar_teachers_reach_their_stated_accuracy(data_root: Path, ledger: DataLedger, depth: int, stated: float):
    path = str(data_root / "weights" / f"cifar10_resnet{depth}.pth")
    teacher = load_teacher(f"resnet{depth}", "cifar", checkpoint=path, **COLOUR)
    data = CIFAR(str(data_root), 10, **COLOUR, batch_size=500).load(ledger)
    assert data.count == 10_000
    assert accuracy(teacher.network, data) == pytest.approx(stated, abs=0.005)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "top1"),
    [("mobilenet_v2", "mobilenet_v2.pth", 84.8), ("resnet50_v1", "resnet50_v1_fp16.pth", 91.4)],
)
def test_imagenet_teachers_on_the_thousand_validation_images(
    data_root: Path, ledger: DataLedger, name: str, file: str, top1: float
):
    parts = {
        group: OmegaConf.load(CONF / group / f"{option}.yaml")
        for group, option in (("model", name), ("data", "imagenet"))
    }
    config = OmegaConf.create({"paths": {"data": str(data_root)}, **parts})
    config.model.checkpoint = str(data_root / "weights" / file)
    teacher = instantiate(config.model)
    data = instantiate(config.data).load(ledger)
    # one image in a thousand may fall either way with another JPEG decoder
    assert accuracy(teacher.network, data) == pytest.approx(top1, abs=0.2)
