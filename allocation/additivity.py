"""Whether harm adds up: the sum of single sensitivities against what whole networks of random widths suffer.

The integer program rests on it (Hubara et al., ICML 2021, arXiv 2006.10518, section 3.4); the order counts, not the
size, hence Spearman's correlation of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr


def draw_assignments(sizes: Sequence[int], count: int, seed: int) -> list[tuple[int, ...]]:
    """Random assignments from few to many bits: each has a level of its own, around which its groups scatter.

    Args:
        sizes: number of choices of each group, which stand in order of their bits.
        count: how many.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    found = []
    for level in np.linspace(0, 1, count):
        places = np.clip(level + rng.normal(0, 0.25, len(sizes)), 0, 1)
        found.append(tuple(round(float(place) * (size - 1)) for place, size in zip(places, sizes, strict=True)))
    return found


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's correlation; 0 where either side does not vary."""
    if len(set(predicted)) < 2 or len(set(measured)) < 2:
        return 0.0
    found: Any = spearmanr(predicted, measured)
    return float(found.statistic)
