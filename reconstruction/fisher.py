"""Diagonal Fisher: the squared error, weighted by how much the network's output feels each number of a unit's output.

Li et al., "BRECQ", ICLR 2021, arXiv 2102.05426, eq. 9-11: `E[dz' diag((dL/dz)^2) dz]`. We take L = KL(float logits ||
logits), which needs no labels, and its gradient where it is not zero: behind the unit rounded to the nearest, in front
of the float rest of the network. The released code adds 1 to `|dL/dz|` before squaring, which makes it a squared error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reconstruction.activations import ActivationCache
from reconstruction.objectives import Objective, per_image, total
from reconstruction.tail import divergence

log = logging.getLogger(__name__)
SMALLEST = torch.finfo(torch.float32).tiny  # gradients below it have no digits left to compare


@dataclass(frozen=True)
class DiagonalFisher(Objective):
    """`sum w (student - target)^2` with `w = g^2 / mean(g^2)`, `g = dL/dz` of each image at the unit's output.

    The mean is over all outputs of the unit and all images that are learned from, so that the error keeps its size.
    Where g is zero throughout (the unit changes no logit) or not finite, the plain squared error remains.
    """

    @property
    def weighted(self) -> bool:
        """Always."""
        return True

    def enter(self, cache: ActivationCache, kept: Tensor) -> None:
        """Take g for all images, in batches, at the cost of a forward and a backward of the tail."""
        weights: list[Tensor] = []
        squares = torch.zeros(len(cache.images), dtype=torch.float64)
        for part in cache.slices():
            for i, gradient in enumerate(output_gradients(cache, part)):
                if len(weights) == i:
                    weights.append(cache.storage.like(gradient, len(cache.images)))
                weights[i][part] = gradient
                squares[part] += gradient.double().square().flatten(1).sum(1).cpu()
        numbers = sum(weight[0].numel() for weight in weights)
        scale = float((squares[kept].mean() / numbers).sqrt())
        usable = SMALLEST < scale < float("inf")
        if not usable:
            name = cache.units[cache.position or 0].name
            log.warning("%s: the logits do not depend on this unit's error; it is learned by the squared error", name)
        for weight in weights:
            if usable:
                weight.div_(scale).square_()
            else:
                weight.fill_(1.0)
        cache.weights = weights

    def errors(self, cache: ActivationCache, outputs: Sequence[Tensor], index: Tensor | slice) -> Tensor:
        """Summed over channels and the unit's outputs, averaged over positions."""
        targets, weights = cache.pick(cache.targets, index), cache.pick(cache.weights, index)
        differences = (y.float() - target for y, target in zip(outputs, targets, strict=True))
        return total(per_image(w * d.square()) for w, d in zip(weights, differences, strict=True))


def output_gradients(cache: ActivationCache, part: slice) -> list[Tensor]:
    """`dL/dz` of some images at every output of the current unit, as the student's unit now stands."""
    with torch.no_grad():
        outputs = cache.student_module(*cache.pick(cache.student_inputs, part))
    leaves = [output.detach().clone().requires_grad_() for output in outputs]
    (teacher,) = cache.pick([cache.logits], part)
    with torch.enable_grad():
        logits = cache.tail(leaves, cache.tail_inputs(part))
        loss = divergence(teacher, logits).sum()  # images do not meet: each has its own g
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))
