"""Swing convolution: what is shifted, and that nothing of it stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from synthesis.seeding import seeded
from synthesis.surgery import SwingConvolution


def test_every_shift_is_a_crop_of_the_reflected_input() -> None:
    x = torch.randn(2, 3, 5, 6)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    crops = {(i, j): padded[:, :, i : i + 5, j : j + 6] for i in range(3) for j in range(3)}
    seen = set()
    for seed in range(60):
        shifted = SwingConvolution().shift(x, seeded(seed))
        seen |= {place for place, crop in crops.items() if torch.equal(crop, shifted)}
    assert seen == set(crops)


def test_only_strided_convolutions_swing_and_only_inside() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)).eval()
    x = torch.randn(2, 3, 8, 8)
    plain, rng = network(x), seeded(3)
    with SwingConvolution()(network, rng):
        swung = network(x)
    expected = network[1](SwingConvolution().shift(network[0](x), seeded(3)))
    assert torch.equal(swung, expected)
    assert torch.equal(network(x), plain)


def test_maps_too_small_to_reflect_stay() -> None:
    x = torch.randn(1, 2, 1, 4)
    assert SwingConvolution().shift(x, seeded(0)) is x
