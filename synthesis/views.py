"""What a network, or a prior, sees of the images: shifts, flips, crops, filters. No loops over samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class View(ABC):
    """A differentiable, possibly random, change of the images."""

    @abstractmethod
    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        """Return the view of `images` (N, C, H, W) at a step; every draw comes from `rng`, a CPU generator."""


class Identity(View):
    """The images themselves."""

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        return images


class RollFlip(View):
    """Roll all images by one random offset and flip them all, or none (DeepInversion, arXiv 1912.08795).

    Args:
        shift: largest offset in pixels, in both directions.
        flip: probability of the horizontal flip.
    """

    def __init__(self, shift: int = 30, flip: float = 0.5) -> None:
        if shift < 0:
            raise ValueError(f"shift: expected a number of pixels >= 0, got {shift}")
        self.shift = shift
        self.flip = _probability("flip", flip)

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        down, right = torch.randint(-self.shift, self.shift + 1, (2,), generator=rng).tolist()
        images = images.roll((down, right), (2, 3))
        return images.flip(3) if _coin(self.flip, rng) else images


class RandomResizedCrop(View):
    """Crop a random part of each image, resize it back and perhaps flip it (IntraQ, arXiv 2111.09136).

    Args:
        scale: smallest and largest share of the area that is kept.
        ratio: smallest and largest width / height of the crop, relative to the image's own.
        flip: probability of the horizontal flip, for each sample.
        probability: of the view being applied at all, for the whole batch.
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.5, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        *,
        flip: float = 0.5,
        probability: float = 0.5,
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale: expected 0 < smallest <= largest <= 1, got {tuple(scale)}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio: expected 0 < smallest <= largest, got {tuple(ratio)}")
        self.scale = scale
        self.ratio = ratio
        self.flip = _probability("flip", flip)
        self.probability = _probability("probability", probability)

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        if not _coin(self.probability, rng):
            return images
        area, aspect, x, y, flip = torch.rand(5, len(images), generator=rng)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * area
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        aspect = (low + (high - low) * aspect).exp()
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        theta = torch.zeros(len(images), 2, 3)
        theta[:, 0, 0] = torch.where(flip < self.flip, -width, width)
        theta[:, 1, 1] = height
        theta[:, 0, 2] = (2 * x - 1) * (1 - width)
        theta[:, 1, 2] = (2 * y - 1) * (1 - height)
        grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class AveragePool(View):
    """Shrink by an integer factor, for the coarse stage of a multi-resolution schedule."""

    def __init__(self, factor: int = 2) -> None:
        if factor < 1:
            raise ValueError(f"factor: expected an integer >= 1, got {factor}")
        self.factor = factor

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        return F.avg_pool2d(images, self.factor)


class InTurn(View):
    """One view for the first so many steps, the next for the following, and so on: coarse images first.

    Args:
        views: in order.
        steps: of each view; the last view stays for what is left.
    """

    def __init__(self, views: Sequence[View], steps: Sequence[int]) -> None:
        if len(views) != len(steps) or not views or min(steps) < 1:
            raise ValueError(f"steps: expected a positive number for each of {len(views)} views, got {list(steps)}")
        self.views = list(views)
        self.steps = list(steps)

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        for view, length in zip(self.views, self.steps, strict=True):
            if step < length:
                return view(images, rng, step)
            step -= length
        return self.views[-1](images, rng, step)


class AllOf(View):
    """Several views, one after the other."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = list(views)

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        for view in self.views:
            images = view(images, rng, step)
        return images


class LowPass(View):
    """Multiply the spectrum by exp(-D^2 / (2 D0^2)), D the distance from frequency zero in cycles an image.

    Kim, Kim, Kang, "SynQ: Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning", ICLR 2025, which filters
    finished images.

    Args:
        cutoff: D0 for an image of 224 pixels, in cycles an image (published: 20 to 100); it is scaled by the height,
            so that it means the same share of the highest frequency at every size.
    """

    def __init__(self, cutoff: float = 70.0) -> None:
        if cutoff <= 0:
            raise ValueError(f"cutoff: expected a positive number of cycles an image, got {cutoff}")
        self.cutoff = cutoff

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        height, width = images.shape[2:]
        down = torch.fft.fftfreq(height, 1 / height, device=images.device)
        right = torch.fft.rfftfreq(width, 1 / width, device=images.device)
        limit = self.cutoff * height / 224
        gain = (-(down[:, None].square() + (right * (height / width)).square()) / (2 * limit**2)).exp()
        return torch.fft.irfft2(torch.fft.rfft2(images) * gain, s=(height, width))


def _coin(probability: float, rng: torch.Generator) -> bool:
    return float(torch.rand((), generator=rng)) < probability


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
    return value
