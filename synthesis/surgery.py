"""Temporary changes of the frozen network while images are made; undone when their `with` ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Surgery(ABC):
    """A change of what a network computes."""

    keeps_features = False  # whether features mean the same as in the unchanged network

    @abstractmethod
    def __call__(self, network: nn.Module, rng: torch.Generator) -> Any:
        """Return a context manager inside which `network` is changed; every draw comes from `rng`."""


class SwingConvolution(Surgery):
    """Shift the input of every strided convolution by up to `reach` pixels, a whole batch alike, reflected at borders.

    Jeon, Lee, Kim, "GENIE: Show Me the Data for Quantization", CVPR 2023, arXiv 2212.04780, section 3.1: a strided
    convolution passes gradients to some pixels more than to others, which leaves checkerboards in the images.

    Args:
        reach: pixels of padding, 1 in the paper.
    """

    def __init__(self, reach: int = 1) -> None:
        if reach < 1:
            raise ValueError(f"surgery.reach: expected at least 1 pixel, got {reach}")
        self.reach = reach

    @contextmanager
    def __call__(self, network: nn.Module, rng: torch.Generator) -> Iterator[None]:
        strided = [m for m in network.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1]
        handles = [module.register_forward_pre_hook(lambda _, x: (self.shift(x[0], rng), *x[1:])) for module in strided]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def shift(self, x: Tensor, rng: torch.Generator) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Return a random crop, of the same size, of `x` padded by reflection; maps too small to reflect stay."""
        height, width = x.shape[2:]
        if min(height, width) <= self.reach:
            return x
        top, left = torch.randint(0, 2 * self.reach + 1, (2,), generator=rng).tolist()
        return F.pad(x, (self.reach,) * 4, mode="reflect")[:, :, top : top + height, left : left + width]
