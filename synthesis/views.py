"""What a network, or a prior, sees of the images: shifts, flips, crops, filters. No loops over samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from synthesis.stages import Stages


class View(ABC):
    """A differentiable, possibly random, change of the images."""

    @property
    def settled_from(self) -> int:
        """The first step of the last stage; before it images may still be coarse."""
        return 0

    def plan(self, steps: int) -> None:  # noqa: B027  most views do not ask
        """Learn how many steps a batch of images takes, once, before the first."""

    @abstractmethod
    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        """Return the view of `images` (N, C, H, W) at a step; every draw comes from `rng`, a CPU generator."""


class Identity(View):
    """The images themselves."""

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        return images


class RollFlip(View):
    """Roll all images by one random offset and flip them all, or none (DeepInversion, arXiv 1912.08795).

    What leaves the image at one border comes back at the other, as in the released code.

    Args:
        shift: largest offset in pixels, in both directions.
        flip: probability of the horizontal flip.
        size: height of the images that `shift` is meant for; at other heights it is scaled, so that it means the same
            share of the image. 30 pixels would tear images of 28 apart anywhere. None: pixels, whatever the height.
    """

    def __init__(self, shift: int = 30, flip: float = 0.5, *, size: int | None = None) -> None:
        if shift < 0:
            raise ValueError(f"shift: expected a number of pixels >= 0, got {shift}")
        if size is not None and size < 1:
            raise ValueError(f"size: expected the height of an image, or null for shifts in pixels, got {size}")
        self.shift = shift
        self.flip = _probability("flip", flip)
        self.size = size

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        shift = self.shift if self.size is None else round(self.shift * images.shape[2] / self.size)
        down, right = torch.randint(-shift, shift + 1, (2,), generator=rng).tolist()
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
    """One view for the first stage, the next for the following, and so on: coarse images first.

    Args:
        views: in order.
        shares: length of each view's stage, in proportion; see `Stages`.
    """

    def __init__(self, views: Sequence[View], shares: Sequence[int]) -> None:
        if len(views) != len(shares):
            raise ValueError(f"shares: expected a positive number for each of {len(views)} views, got {list(shares)}")
        self.views = list(views)
        self.stages = Stages(shares)

    @property
    def settled_from(self) -> int:
        return self.stages.starts[-1]

    def plan(self, steps: int) -> None:
        self.stages.plan(steps)

    def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
        stage = min(self.stages.index(step), len(self.views) - 1)
        return self.views[stage](images, rng, step)


class AllOf(View):
    """Several views, one after the other."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = list(views)

    @property
    def settled_from(self) -> int:
        return max((view.settled_from for view in self.views), default=0)

    def plan(self, steps: int) -> None:
        for view in self.views:
            view.plan(steps)

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
        spectrum = torch.fft.rfft2(images.contiguous())  # MKL's FFT in torch 2.8 refuses expanded tensors
        return torch.fft.irfft2(spectrum * gain, s=(height, width))


def _coin(probability: float, rng: torch.Generator) -> bool:
    return float(torch.rand((), generator=rng)) < probability


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
    return value
