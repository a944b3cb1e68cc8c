"""Noise with the second-order statistics of photographs: amplitude 1/f over space, and channels that mostly agree.

Field, "Relations between the statistics of natural images and the response properties of cortical cells", JOSA A 4,
1987: the amplitude of natural images falls as 1/f. Ruderman, Cronin, Chiao, "Statistics of cone responses to natural
images", JOSA A 15, 1998: their colours vary mostly along luminance. Both hold for photographs in general, so nothing
is known of a data set; white noise, the usual control, has neither.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coloured_noise(
    shape: tuple[int, ...] | torch.Size, rng: torch.Generator, *, exponent: float = 1.0, luminance: float = 0.9
) -> Tensor:
    """Gaussian images (N, C, H, W) of mean 0 and deviation 1 over all of them.

    Args:
        shape: (N, C, H, W).
        rng: a CPU generator.
        exponent: the amplitude falls as 1 / f^exponent; 0 gives white noise.
        luminance: share of the variance that all channels have in common.
    """
    count, channels, height, width = shape
    if channels == 1:
        return _field(count, 1, height, width, rng, exponent)
    common = _field(count, 1, height, width, rng, exponent)
    own = _field(count, channels, height, width, rng, exponent)
    return luminance**0.5 * common + (1 - luminance) ** 0.5 * own


def _field(count: int, channels: int, height: int, width: int, rng: torch.Generator, exponent: float) -> Tensor:
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = 1 / max(height, width)  # the mean of an image varies as its slowest wave does
    spectrum = torch.fft.rfft2(torch.randn(count, channels, height, width, generator=rng)) / frequency**exponent
    field = torch.fft.irfft2(spectrum, s=(height, width))
    # the expected deviation, not the measured one: an image's own contrast is left to chance
    weights = torch.full_like(frequency, 2.0)
    weights[:, 0] = 1.0
    if width % 2 == 0:
        weights[:, -1] = 1.0
    return field / ((weights / frequency ** (2 * exponent)).sum() / (height * width)).sqrt()
