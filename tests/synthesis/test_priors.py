"""Priors: values by hand, independent of the batch size, finite on constant images."""

from __future__ import annotations

import statistics

import pytest
import torch

from synthesis.priors import InputMoments, L2Norm, Prior, TotalVariation
from synthesis.views import RollFlip

RNG = torch.Generator()


@pytest.mark.parametrize("prior", [TotalVariation(0.1), L2Norm(0.1), InputMoments(0.1)])
def test_independent_of_the_batch_size(prior: Prior) -> None:
    images = torch.randn(3, 3, 6, 5)
    torch.testing.assert_close(prior(images.repeat(4, 1, 1, 1), RNG), prior(images, RNG))
    torch.testing.assert_close(prior(images, RNG), torch.stack([prior(image[None], RNG) for image in images]).mean())


def test_values_by_hand() -> None:
    image = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).view(1, 1, 2, 2)
    rows, columns = (1 + 16) ** 0.5, (9 + 36) ** 0.5
    assert TotalVariation(2.0)(image, RNG).item() == pytest.approx(2 * (rows + columns + 7 + 2))
    assert L2Norm(2.0)(image, RNG).item() == pytest.approx(2 * 85**0.5)


def test_input_moments_written_out_image_by_image() -> None:
    images = 3 * torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) - 1
    total = 0.0
    for image in images:
        for channel in image:
            pixels = channel.flatten().tolist()
            total += statistics.fmean(pixels) ** 2 + (statistics.stdev(pixels) - 1) ** 2
    assert InputMoments(0.5)(images, RNG).item() == pytest.approx(0.5 * total / 4, rel=1e-4)
    constant = torch.full((2, 3, 4, 4), 2.0, requires_grad=True)
    loss = InputMoments(1.0)(constant, RNG)
    assert loss.item() == pytest.approx(3 * (4 + 1), rel=1e-2)
    assert torch.autograd.grad(loss, constant)[0].isfinite().all()


@pytest.mark.parametrize("prior", [TotalVariation(1.0), L2Norm(1.0)])
def test_zero_and_finite_gradient_on_black_images(prior: Prior) -> None:
    images = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = prior(images, RNG)
    (gradient,) = torch.autograd.grad(loss, images)
    assert loss.item() == 0
    assert gradient.isfinite().all()


def test_a_prior_has_its_own_view() -> None:
    images = torch.arange(36.0).view(1, 1, 6, 6)
    rolled = TotalVariation(1.0, RollFlip(3))(images, torch.Generator().manual_seed(0))
    assert rolled.item() > TotalVariation(1.0)(images, RNG).item()
