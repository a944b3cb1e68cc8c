"""What images look like apart from any network: smooth and small. Both are means over the batch.

Yin et al., "Dreaming to Distill" (DeepInversion), CVPR 2020, arXiv 1912.08795. We differ in one point: the published
norms run over the whole batch and so grow with its size; here each image has its own norm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from synthesis.moments import moments
from synthesis.views import Identity, View


class Prior(ABC):
    """A weighted penalty on the images themselves.

    Args:
        weight: of the penalty in the synthesis loss.
        view: what the penalty sees of the images; the network's view is another choice.
    """

    def __init__(self, weight: float, view: View | None = None) -> None:
        self.weight = weight
        self.view = Identity() if view is None else view

    def __call__(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return the weighted penalty of images (N, C, H, W), a scalar."""
        return self.weight * self.penalty(self.view(images, rng), rng)

    @abstractmethod
    def penalty(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return the penalty without its weight."""


class TotalVariation(Prior):
    """Sum of the l2 norms of the horizontal, vertical and two diagonal differences of each image."""

    def penalty(self, images: Tensor, rng: torch.Generator) -> Tensor:
        differences = (
            images[..., :, 1:] - images[..., :, :-1],
            images[..., 1:, :] - images[..., :-1, :],
            images[..., 1:, 1:] - images[..., :-1, :-1],
            images[..., 1:, :-1] - images[..., :-1, 1:],
        )
        return torch.stack([_norms(difference).mean() for difference in differences]).sum()


class L2Norm(Prior):
    """The l2 norm of each image."""

    def penalty(self, images: Tensor, rng: torch.Generator) -> Tensor:
        return _norms(images).mean()


class InputMoments(Prior):
    """Squared distance of each image's channel means from 0 and deviations from 1, summed over channels (GENIE).

    Jeon, Lee, Kim, "GENIE", CVPR 2023, arXiv 2212.04780. ZeroQ's input term is the same with the probe of the layers
    (`input_weight`); GENIE takes it image by image although its layers see the whole batch.
    """

    def penalty(self, images: Tensor, rng: torch.Generator) -> Tensor:
        mean, var = moments(images, "sample", unbiased=True)
        return (mean.square() + ((var + 1e-6).sqrt() - 1).square()).sum(1).mean()


def _norms(images: Tensor) -> Tensor:  # (N, C, H, W) -> (N,)
    return torch.linalg.vector_norm(images, dim=(1, 2, 3))
