"""Coloured noise has the spectrum and the colours it claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthesis.coloured_noise import coloured_noise
from synthesis.sources import Pixels


def drawn(*shape: int, seed: int = 0, **options: float) -> torch.Tensor:
    return coloured_noise(shape, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("size", [(16, 16), (15, 17), (8, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_mean_zero_and_deviation_one(size: tuple[int, int], channels: int) -> None:
    images = drawn(4000, channels, *size)
    assert float(images.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(images.square().mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_the_amplitude_falls_as_a_power_of_the_frequency(exponent: float) -> None:
    """Against numpy's own transform of the finished images: a line in the doubly logarithmic plot."""
    images = drawn(2000, 1, 32, 32, exponent=exponent).squeeze(1).double().numpy()
    power = (np.abs(np.fft.fft2(images)) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32), np.fft.fftfreq(32), indexing="ij"))
    inside = frequency > 0
    slope, _ = np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)
    assert slope == pytest.approx(-2 * exponent, abs=0.03)


def test_channels_share_what_luminance_says() -> None:
    images = drawn(3000, 3, 8, 8, luminance=0.9)
    correlations = np.corrcoef(images.transpose(0, 1).flatten(1).numpy())
    assert correlations[np.triu_indices(3, 1)] == pytest.approx(0.9, abs=0.02)


def test_the_same_seed_gives_the_same_images() -> None:
    assert torch.equal(drawn(3, 3, 8, 8, seed=5), drawn(3, 3, 8, 8, seed=5))
    assert not torch.equal(drawn(3, 3, 8, 8, seed=5), drawn(3, 3, 8, 8, seed=6))


def test_pixels_start_from_it_within_their_bounds() -> None:
    source = Pixels(4, (3, 8, 8), init="coloured", valid=([0.5, 0.5, 0.5], [0.25, 0.25, 0.25]))
    source.reset(torch.Generator().manual_seed(1))
    expected = drawn(4, 3, 8, 8, seed=1).clamp(-2.0, 2.0)
    torch.testing.assert_close(source.pixels.detach(), expected)


def test_neighbouring_pixels_agree() -> None:
    """As in photographs, and unlike in white noise."""
    white, coloured = drawn(64, 3, 16, 16, exponent=0.0), drawn(64, 3, 16, 16)
    agreement = [float((x[..., 1:] * x[..., :-1]).mean() / x.square().mean()) for x in (white, coloured)]
    assert agreement[0] == pytest.approx(0.0, abs=0.02)
    assert agreement[1] > 0.5
