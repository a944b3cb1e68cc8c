"""The classes that synthetic images are made for, as probabilities (N, K): one-hot, or a mixture of classes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelSource(ABC):
    """Draws labels; `every_step` says whether anew for each optimizer step, or once for each batch of images."""

    every_step: bool = False

    @abstractmethod
    def draw(self, count: int, classes: int, rng: torch.Generator) -> Tensor:
        """Return (count, classes) probabilities; every draw comes from `rng`, a CPU generator."""


class RandomLabels(LabelSource):
    """Independent uniform classes, one-hot.

    Args:
        every_step: see `LabelSource`; a generator that learns from fresh latents needs fresh labels too.
    """

    def __init__(self, *, every_step: bool = False) -> None:
        self.every_step = every_step

    def draw(self, count: int, classes: int, rng: torch.Generator) -> Tensor:
        return F.one_hot(torch.randint(classes, (count,), generator=rng), classes).float()


class BalancedLabels(LabelSource):
    """All classes equally often, up to one, in random order; one-hot."""

    def draw(self, count: int, classes: int, rng: torch.Generator) -> Tensor:
        rounds = -(-count // classes)
        order = torch.cat([torch.randperm(classes, generator=rng) for _ in range(rounds)])[:count]
        return F.one_hot(order, classes).float()


class SuperposedLabels(LabelSource):
    """With probability p a softmax(N(0, 1))-weighted mixture of M classes drawn with replacement, else one class.

    Choi et al., "Qimera", NeurIPS 2021, arXiv 2111.02625.

    Args:
        probability: p, of a sample to be superposed.
        mixed: M; the paper takes 2 for 10 classes, 10 for 100, 100 to 500 for ImageNet.
    """

    every_step = True

    def __init__(self, probability: float = 0.4, mixed: int = 2) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"labels.probability: expected a probability in [0, 1], got {probability}")
        if mixed < 2:
            raise ValueError(f"labels.mixed: expected at least 2 classes to mix, got {mixed}")
        self.probability = probability
        self.mixed = mixed

    def draw(self, count: int, classes: int, rng: torch.Generator) -> Tensor:
        chosen = torch.randint(classes, (count, self.mixed), generator=rng)
        weights = torch.randn(count, self.mixed, generator=rng).softmax(1)
        single = torch.rand(count, 1, generator=rng) >= self.probability
        weights = torch.where(single, F.one_hot(torch.zeros(count, dtype=torch.long), self.mixed).float(), weights)
        return torch.zeros(count, classes).scatter_add_(1, chosen, weights)
