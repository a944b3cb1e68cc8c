"""From measured harm to sensitivities: without the baseline, never less with fewer bits, and how certain.

Measurements are noisy where they are small; the closest values (least squares) that do not rise with the bits take
their place (isotonic regression, here on the partial order of weight and activation widths).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from allocation.groups import Choice
from allocation.resources import Values

RESAMPLES = 200


class Measured(NamedTuple):
    """Sensitivities (options,) of one group, and the deviation of each under resampling."""

    values: Values
    deviation: Values


def tidy(harm: Tensor, baseline: Tensor, choices: Sequence[Choice], *, seed: int = 0) -> Measured:
    """Sensitivities of one group's options.

    Args:
        harm: (options, S), one number a sample.
        baseline: (S,), the harm of the base on the same samples.
        choices: the options.
        seed: of the bootstrap.
    """
    excess = harm.double() - baseline.double()
    samples = excess.shape[1]
    drawn = torch.randint(samples, (RESAMPLES, samples), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, samples, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    means = excess @ counts.T / samples  # (options, resamples)
    values = not_rising(excess.mean(1).numpy(), [_widths(choice) for choice in choices])
    return Measured(np.maximum(values, 0.0), means.std(1, correction=0).numpy())


def not_rising(values: Values, widths: Sequence[Sequence[int]]) -> Values:
    """The closest values (C,) that are nowhere larger where every width is at least as large.

    The projection onto these is `values + A' x` with the x >= 0 that makes it smallest, where a row of A is one pair.
    """
    pairs = _covers(widths)
    scale = float(np.abs(values).max())
    if not pairs or scale == 0:
        return np.array(values, dtype=np.float64)
    constraints = np.zeros((len(pairs), len(values)))
    for row, (few, many) in enumerate(pairs):
        constraints[row, few], constraints[row, many] = 1.0, -1.0
    # bvls, not scipy's nnls, which ends in the wrong place where constraints depend on each other
    moves = lsq_linear(constraints.T, -values / scale, bounds=(0, np.inf), method="bvls", tol=1e-14, max_iter=10000).x
    return values + scale * constraints.T @ moves


def _covers(widths: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs with nothing between them; all others follow."""

    def below(a: Sequence[int], b: Sequence[int]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    return [
        (few, many)
        for few, a in enumerate(widths)
        for many, b in enumerate(widths)
        if below(a, b) and not any(below(a, c) and below(c, b) for c in widths)
    ]


def _widths(choice: Choice) -> list[int]:
    return [bits for pair in choice.layers for bits in pair] + list(choice.sites)
