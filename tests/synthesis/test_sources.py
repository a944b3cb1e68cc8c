"""Pixels: initial distributions, identity of the parameter, clamping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthesis.seeding import seeded
from synthesis.sources import Pixels

SIZE = (3, 32, 32)


def shown(source: Pixels) -> Tensor:
    return source(seeded("latent"), torch.zeros(source.batch_size, 2)).detach()


@pytest.mark.parametrize(
    ("init", "mean", "std"), [("normal", 0, 1), ("uniform", 0.5, 12**-0.5), ("zeroq_legacy", 0, 0.0136)]
)
def test_initial_distribution(init: str, mean: float, std: float) -> None:
    source = Pixels(32, SIZE, init=init)  # type: ignore[arg-type]
    source.reset(seeded(0))
    images = shown(source)
    assert images.mean().item() == pytest.approx(mean, abs=0.02 * max(std, mean))
    assert images.std().item() == pytest.approx(std, rel=0.02)


def test_reset_is_in_place_and_a_function_of_the_generator() -> None:
    source = Pixels(2, SIZE)
    (group,) = source.parameter_groups()
    source.reset(seeded(0))
    first = shown(source).clone()
    source.reset(seeded(1))
    assert not torch.equal(shown(source), first)
    source.reset(seeded(0))
    assert torch.equal(shown(source), first)
    assert group["params"][0] is source.pixels


def test_clamp_by_channel() -> None:
    source = Pixels(2, SIZE, clamp=((-1.0, -0.5, 0.0), 0.1))
    source.reset(seeded(0))
    assert shown(source).amin((0, 2, 3)).tolist() == [-1.0, -0.5, 0.0]
    assert shown(source).max().item() == pytest.approx(0.1)


def test_valid_pixels_of_a_normalisation() -> None:
    mean, std = (0.2, 0.5, 0.9), (0.1, 0.2, 0.3)
    source = Pixels(16, SIZE, init="valid_uniform", valid=(mean, std))
    source.reset(seeded(0))
    pixels = shown(source) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert pixels.min().item() == pytest.approx(0, abs=1e-3)
    assert pixels.max().item() == pytest.approx(1, abs=1e-3)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.5] * 3, abs=0.01)
    with torch.no_grad():
        source.pixels.add_(100)
    source.constrain()
    assert shown(source).amax((0, 2, 3)).tolist() == pytest.approx([8, 2.5, 1 / 3])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="init: expected one of normal"):
        Pixels(2, SIZE, init="gauss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        Pixels(0, SIZE)
    with pytest.raises(ValueError, match="clamp, valid"):
        Pixels(1, SIZE, clamp=(0.0, 1.0), valid=((0.5,) * 3, (0.2,) * 3))
    with pytest.raises(ValueError, match="init: expected bounds"):
        Pixels(1, SIZE, init="valid_uniform")
