"""Pixels: initial distributions, identity of the parameter, clamping."""

from __future__ import annotations

import pytest
import torch

from synthesis.seeding import seeded
from synthesis.sources import Pixels

SIZE = (3, 32, 32)


@pytest.mark.parametrize(
    ("init", "mean", "std"), [("normal", 0, 1), ("uniform", 0.5, 12**-0.5), ("zeroq_legacy", 0, 0.0136)]
)
def test_initial_distribution(init: str, mean: float, std: float) -> None:
    source = Pixels(32, SIZE, init=init)  # type: ignore[arg-type]
    source.reset(seeded(0))
    images = source()
    assert images.mean().item() == pytest.approx(mean, abs=0.02 * max(std, mean))
    assert images.std().item() == pytest.approx(std, rel=0.02)


def test_reset_is_in_place_and_a_function_of_the_generator() -> None:
    source = Pixels(2, SIZE)
    (group,) = source.parameter_groups()
    source.reset(seeded(0))
    first = source().detach().clone()
    source.reset(seeded(1))
    assert not torch.equal(source(), first)
    source.reset(seeded(0))
    assert torch.equal(source(), first)
    assert group["params"][0] is source.pixels


def test_clamp_by_channel() -> None:
    source = Pixels(2, SIZE, clamp=((-1.0, -0.5, 0.0), 0.1))
    source.reset(seeded(0))
    assert source().amin((0, 2, 3)).tolist() == [-1.0, -0.5, 0.0]
    assert source().max().item() == pytest.approx(0.1)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="init: expected one of normal"):
        Pixels(2, SIZE, init="gauss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        Pixels(0, SIZE)
