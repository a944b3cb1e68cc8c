"""How far a unit's output is from its target, and by which constant that is divided.

The error sums over channels and averages over images and positions, as in Li et al., "BRECQ", ICLR 2021, arXiv
2102.05426. Its size differs by orders of magnitude between networks, units and bit-widths, while the regularizer of
learned rounding does not. Published code adapts the regularizer's weight network by network; we divide the error by a
constant of the unit instead, so that one weight serves all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from reconstruction.activations import ActivationCache

Normalization = Literal["entry_error", "power", "none"]
SMALLEST_SHARE = 1e-8  # least normalizer, as a share of the target's power: the rounding noise of float32 squared


class Objective(ABC):
    """How far a unit's outputs are from where they should be; has no state, what a unit needs is kept in the cache."""

    @property
    def weighted(self) -> bool:
        """Whether `enter` keeps weights as large as the targets, which depend on the unit as it stands then."""
        return False

    def enter(self, cache: ActivationCache, kept: Tensor) -> None:
        """Measure, once a unit and with it rounded to the nearest, what `errors` needs.

        Args:
            cache: at the unit.
            kept: the images that are learned from; others must not have a say.
        """
        cache.weights = []

    @abstractmethod
    def errors(self, cache: ActivationCache, outputs: Sequence[Tensor], index: Tensor | slice) -> Tensor:
        """The error of each image of a batch, (N,); `outputs` are the current unit's for the images `index`."""


@dataclass(frozen=True)
class PowerError(Objective):
    """`|student - target|^p`, summed over channels; p = 2 is the squared error, 2.4 what BRECQ uses for activations.

    Raises:
        ValueError: if `p` is below 1, where the gradient at an error of 0 is infinite.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"p: expected an exponent of at least 1, got {self.p}; 2 gives the squared error")

    def __call__(self, student: Tensor, target: Tensor) -> Tensor:
        """The error of each image: (N, C, *positions) twice -> (N,); float32 also under autocast."""
        difference = student.float() - target.float()
        error = difference.square() if self.p == 2.0 else difference.abs().pow(self.p)
        return per_image(error)

    def errors(self, cache: ActivationCache, outputs: Sequence[Tensor], index: Tensor | slice) -> Tensor:
        """Summed over the unit's outputs."""
        return total(map(self, outputs, cache.pick(cache.targets, index)))


def per_image(error: Tensor) -> Tensor:
    """Summed over channels, averaged over positions: (N, C, *positions) -> (N,)."""
    summed = error.sum(1) if error.dim() > 1 else error
    return summed.flatten(1).mean(1) if summed.dim() > 1 else summed


def total(errors: Iterable[Tensor]) -> Tensor:
    """The sum over a unit's outputs."""
    parts = list(errors)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


@dataclass(frozen=True)
class UnitLoss:
    """Error of a unit over a constant of that unit, plus the rounding regularizer.

    Attributes:
        regularizer_weight: of the mean rounding penalty, which lies between 0 and 1.
        normalization: the constant: "entry_error", the unit's own error before learning with every rounding to the
            nearest, so that the error starts near 1 at any bit-width; "power", that of an output of zeros, `E|z|^p`;
            "none", 1.
        objective: the error.

    Raises:
        ValueError: if the weight is negative or the normalization unknown.
    """

    regularizer_weight: float = 100.0
    normalization: Normalization = "entry_error"
    objective: Objective = PowerError()

    def __post_init__(self) -> None:
        if self.regularizer_weight < 0:
            raise ValueError(f"regularizer_weight: expected 0 or more, got {self.regularizer_weight}")
        if self.normalization not in get_args(Normalization):
            raise ValueError(f"normalization: expected one of {get_args(Normalization)}, got {self.normalization!r}")

    def normalizer(self, *, entry_error: float, power: float) -> float:
        """The constant, from the error at entry and from that of zeros."""
        if self.normalization == "none":
            return 1.0
        chosen = max(entry_error, SMALLEST_SHARE * power) if self.normalization == "entry_error" else power
        return chosen if chosen > 0 else 1.0  # the target is all zero, and the student meets it
