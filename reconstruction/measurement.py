"""The errors of a unit on all images: at entry, as learned, and as deployed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reconstruction.activations import ActivationCache
from reconstruction.learnables import Learnables
from reconstruction.objectives import UnitLoss
from reconstruction.schedules import held_out

log = logging.getLogger(__name__)
SOFT_LIMIT = 0.01  # share of undecided roundings at a unit's end above which hardening is partly arbitrary
WORSE_LIMIT = 2.0  # times the error of rounding to nearest, at a unit's end
NEGLIGIBLE = 1e-3  # share of the target's power; a larger error than that of rounding to nearest may be within it


@torch.no_grad()
def image_errors(cache: ActivationCache, loss: UnitLoss) -> Tensor:
    """The error of the current unit for every image, as the unit now stands; (N,) on the CPU."""
    parts = []
    for part in cache.slices():
        outputs = cache.student_module(*cache.pick(cache.student_inputs, part))
        parts.append(loss.objective.errors(cache, outputs, part).cpu())
    return torch.cat(parts)


@torch.no_grad()
def image_powers(cache: ActivationCache, loss: UnitLoss) -> Tensor:
    """The error that an output of zeros would have, for every image; (N,) on the CPU."""
    parts = []
    for part in cache.slices():
        zeros = [torch.zeros_like(target) for target in cache.pick(cache.targets, part)]
        parts.append(loss.objective.errors(cache, zeros, part).cpu())
    return torch.cat(parts)


class Measurement:
    """Means over the images that are learned from, and apart from them over those held out.

    Args:
        loss: whose error is measured.
        count: number of images.
        holdout: share of them that is never learned from.
        seed: which ones.
    """

    def __init__(self, loss: UnitLoss, count: int, holdout: float, *, seed: int) -> None:
        self.loss = loss
        self.kept, self.held = held_out(count, holdout, seed=seed)

    def entry(self, cache: ActivationCache, learnables: Learnables, state: Sequence[Tensor] | None) -> dict[str, float]:
        """`error_nearest` and `power` of the unit rounded to the nearest; the objective takes what it needs from it.

        `state` of the unit is that before its first step; None: as it stands.
        """
        with learnables.hardened(state):
            self.loss.objective.enter(cache, self.kept)
            return self.errors(cache, "nearest") | self.power(cache)

    def errors(self, cache: ActivationCache, name: str) -> dict[str, float]:
        """`error_<name>` of the unit as it now stands, and `error_<name>_holdout` if images are held out."""
        return self._means(f"error_{name}", image_errors(cache, self.loss))

    def power(self, cache: ActivationCache) -> dict[str, float]:
        """`power`, the error of zeros, and `power_holdout` likewise."""
        return self._means("power", image_powers(cache, self.loss))

    def _means(self, name: str, values: Tensor) -> dict[str, float]:
        means = {name: float(values[self.kept].mean())}
        return means | ({f"{name}_holdout": float(values[self.held].mean())} if len(self.held) else {})


def as_soft(hard: dict[str, float]) -> dict[str, float]:
    """`error_soft` of a unit in which nothing was soft: the errors after hardening."""
    return {name.replace("hard", "soft"): value for name, value in hard.items()}


def relative(errors: Mapping[str, float]) -> dict[str, Any]:
    """The errors as shares of the target's power on the same images."""
    powers = {name: value for name, value in errors.items() if name.startswith("power")}
    shares = {}
    for name, value in errors.items():
        if name not in powers:
            shares[name] = value / (powers["power_holdout" if name.endswith("_holdout") else "power"] or 1.0)
    return shares


def warn_of(unit: str, row: Mapping[str, float]) -> None:
    """Say that a unit was hardened before its roundings were decided, or ended worse than it began."""
    if row["soft_fraction"] > SOFT_LIMIT:
        log.warning(
            "%s: %.1f %% of the roundings were undecided when hardened (error %.2e, before %.2e); "
            "raise reconstruction.regularizer_weight, iterations, or the learning rate",
            unit,
            100 * row["soft_fraction"],
            row["error_hard"],
            row["error_soft"],
        )
    if row["error_hard"] > max(WORSE_LIMIT * row["error_nearest"], NEGLIGIBLE):
        log.warning(
            "%s: learning ended at an error of %.2e of the target's power, rounding to nearest has %.2e; lower the "
            "learning rates, or state them as shares of what they move (activation.relative=true, "
            "reconstruction.bias_relative=true, weight.relative=true where there is one)",
            unit,
            row["error_hard"],
            row["error_nearest"],
        )
