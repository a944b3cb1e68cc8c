"""The pictures of image sets and of targets: drawn whole, and nothing changes by watching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from callbacks.alignment_plot import AlignmentPlot
from callbacks.target_plot import save_targets
from lightning_modules.bn_alignment import BNAlignmentModule
from networks.cifar_resnet import CifarResNet
from synthesis.targets import BNTargets, Slack

SIZE = (3, 8, 8)


def validate(callbacks: list[Any], kind: str = "tensor") -> dict[str, float]:
    torch.manual_seed(0)
    module = BNAlignmentModule(CifarResNet(8).eval(), SIZE)
    rng = torch.Generator().manual_seed(1)
    sets = [list(torch.randn(6, *SIZE, generator=rng)) for _ in range(2)]
    wrap = {"tensor": lambda x: x, "pair": lambda x: (x, 0), "mapping": lambda x: {"image": x, "label": 0}}[kind]
    loaders = [DataLoader([wrap(x) for x in images], batch_size=4) for images in sets]  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks
    )
    found = trainer.validate(module, loaders, verbose=False)
    return {name: value for part in found for name, value in part.items()}


def test_one_picture_of_all_sets_and_the_same_numbers_without_it(tmp_path: Path) -> None:
    path = tmp_path / "sets.png"
    plot = AlignmentPlot(["real", "dsg"], path, mean=(0.5,) * 3, std=(0.2,) * 3, shown=5)
    assert validate([plot]) == validate([])
    with Image.open(path) as picture:
        assert picture.size[0] > 800
    assert [sum(len(part) for part in kept) for kept in plot.images.values()] == [5, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["sets.png"]


@pytest.mark.parametrize("kind", ["pair", "mapping"])
def test_batches_may_hold_more_than_images(tmp_path: Path, kind: str) -> None:
    plot = AlignmentPlot(["real", "dsg"], tmp_path / "sets.png", mean=(0.5,) * 3, std=(0.2,) * 3, shown=5)
    assert validate([plot], kind) == validate([])
    assert [sum(len(part) for part in kept) for kept in plot.images.values()] == [5, 5]


def test_targets_with_and_without_slack(tmp_path: Path) -> None:
    network = CifarResNet(8).eval()
    for name, targets in (("bn", BNTargets()), ("slack", Slack(BNTargets(), images=8, batch_size=8))):
        alignment = BNAlignmentModule(network, SIZE, targets=targets)
        path = save_targets(alignment, tmp_path / f"{name}.png")
        with Image.open(path) as picture:
            assert picture.format == "PNG"
    other = BNAlignmentModule(network, SIZE, targets=targets)
    other.recall(alignment.found_targets())
    assert torch.equal(other.found_targets(), alignment.found_targets())
