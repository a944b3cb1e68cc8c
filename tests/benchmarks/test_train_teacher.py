"""What the training script does to images, against loops; training itself takes an hour."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.train_teacher import CROP_PADDING, MEAN, NETWORKS, STD, augment, erase, parameter_groups


def images(count: int = 400) -> torch.Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + 10


def test_augmented_images_are_crops_of_padded_ones_perhaps_flipped() -> None:
    original = images(20)
    seen = augment(original, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(original, (CROP_PADDING,) * 4, value=-MEAN / STD)
    for before, after in zip(padded, seen, strict=True):
        crops = [
            before[:, top : top + 28, left : left + 28]
            for top in range(2 * CROP_PADDING + 1)
            for left in range(2 * CROP_PADDING + 1)
        ]
        assert any(torch.equal(after, crop) or torch.equal(after, crop.flip(2)) for crop in crops)
    assert torch.equal(seen, augment(original, torch.Generator().manual_seed(1)))


def test_one_rectangle_of_half_of_the_images_is_erased() -> None:
    blank = erase(images(), torch.Generator().manual_seed(1)) == 0
    touched = blank.flatten(1).any(1)
    assert 0.4 < touched.float().mean() < 0.6
    for mask in blank[touched][:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a rectangle
        assert mask.sum() == len(rows) * len(columns)
        assert 0 < mask.float().mean() <= 0.25 + 2 / 28


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_is_trained_once_and_multipliers_slowly(network: str) -> None:
    model = NETWORKS[network](8, num_classes=10, in_channels=1)
    groups = parameter_groups(model, argparse.Namespace(lr=0.2, weight_decay=5e-4))
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim > 1}
    scales = [p for name, p in model.named_parameters() if name.endswith("scale")]
    rates = [group["lr"] for group in groups for p in group["params"] if any(p is scale for scale in scales)]
    assert rates == pytest.approx([0.02] * len(scales))
    assert bool(scales) == (network == "fixup_resnet20")
