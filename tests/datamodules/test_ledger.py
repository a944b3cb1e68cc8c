"""The ledger: a data-free run cannot open real images before it is scored."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.arrays import read_cifar, read_fashion_mnist
from datamodules.calibration import NoiseImages, RealImages, SyntheticImages
from datamodules.evaluation import FashionMNIST
from datamodules.folders import find_imagenet, find_images
from datamodules.ledger import DataLedger
from networks.teachers import Teacher, load_teacher

OPENED: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("resnet8", "random", num_classes=10, input_size=[1, 28, 28], mean=[0.286], std=[0.353])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file the interpreter opens from here on."""
    files: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "OPENED", files)
    return files


def test_records_in_order_and_as_json():
    ledger = DataLedger(data_free=False)
    ledger.opened("calibration", "cifar10", "train", 64, "aa")
    ledger.opened("evaluation", "cifar10", "test", 100, "bb")
    assert [entry["digest"] for entry in json.loads(json.dumps(ledger.entries))] == ["aa", "bb"]
    assert ledger.entries[0] == {
        "stage": "calibration",
        "name": "cifar10",
        "split": "train",
        "count": 64,
        "digest": "aa",
    }


@pytest.mark.parametrize("stage", ["calibration", "synthesis", "Evaluation", ""])
def test_refuses_every_stage_but_evaluation(stage: str):
    ledger = DataLedger(data_free=True)
    with pytest.raises(RuntimeError, match="data-free"):
        ledger.permit(stage, "cifar10", "train")
    with pytest.raises(RuntimeError, match="data-free"):
        ledger.opened(stage, "cifar10", "train", 1, "aa")
    assert ledger.entries == []
    ledger.opened("evaluation", "cifar10", "test", 1, "aa")
    assert len(ledger.entries) == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda folder, ledger: read_fashion_mnist("train", "calibration", ledger),
        lambda folder, ledger: read_cifar(folder, 10, "train", "calibration", ledger),
        lambda folder, ledger: find_imagenet(folder, 1000, "calibration", "calibration", ledger),
        lambda folder, ledger: find_images(folder, "calibration", ledger),
    ],
)
def test_readers_ask_before_they_touch_a_file(read: Callable[..., Any], tmp_path: Path, opened: list[str]):
    with pytest.raises(RuntimeError, match="data-free"):
        read(tmp_path, DataLedger(data_free=True))
    assert opened == []


def test_data_free_sources_open_no_file_at_all(teacher: Teacher, opened: list[str]):
    ledger = DataLedger(data_free=True)
    NoiseImages(8, seed=0).load(teacher, ledger, torch.zeros)
    SyntheticImages(8).load(teacher, ledger, lambda count: torch.zeros(count, 1, 28, 28))
    assert opened == []
    assert ledger.entries == []


def test_real_calibration_is_refused_before_and_evaluation_is_recorded(teacher: Teacher, opened: list[str]):
    ledger = DataLedger(data_free=True)
    with pytest.raises(RuntimeError, match="calibration=real"):
        RealImages("fashion_mnist", "", 8, 0).load(teacher, ledger, torch.zeros)
    assert opened == []
    data = FashionMNIST(mean=[0.286], std=[0.353], input_size=[1, 28, 28], num_classes=10, batch_size=8, limit=16)
    data.load(ledger)
    assert any(name.endswith("test.npz") for name in opened)
    assert [entry["stage"] for entry in ledger.entries] == ["evaluation"]
    assert (ledger.entries[0]["count"], ledger.entries[0]["digest"]) == (16, data.digest)


def test_data_no_ledger_knows_of_cannot_be_tested_on():
    data = FashionMNIST(mean=[0.286], std=[0.353], input_size=[1, 28, 28], num_classes=10, batch_size=8)
    with pytest.raises(RuntimeError, match=r"load\(ledger\)"):
        data.test_dataloader()
