"""Merges neighbouring blocks of very different capacity, so that one makes up for the other while both are learned.

Ma et al., "Solving Oscillation Problem in Post-Training Quantization Through a Theoretical Perspective" (MRECG),
CVPR 2023, arXiv 2303.11906: the error of a chain of blocks oscillates where the module capacity of neighbours differs,
and the pairs with the largest differences are learned jointly. We take a block's number of weights for its capacity:
the paper also has the bit-width, which is common to all blocks here, and a factor for strides, which we leave out.
The released code has hand-written lists of blocks to merge; here they follow from the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import fx

Block = tuple[str, list[fx.Node]]


def pairs_to_merge(capacities: Sequence[int], merges: float) -> list[int]:
    """The i for which blocks i and i + 1 are learned jointly: those of largest capacity difference, in order.

    Args:
        capacities: of the blocks in their order.
        merges: how many pairs; below 1 a share of all pairs, rounded, at least one where there is a pair.

    Raises:
        ValueError: if `merges` is not positive, or above 1 and not whole.
    """
    if merges <= 0 or (merges >= 1 and merges != int(merges)):
        raise ValueError(
            f"merges: expected a number of pairs (1, 2, ...) or a share of them above 0 and below 1, got {merges}; "
            "use granularity=block to merge none"
        )
    differences = [abs(a - b) for a, b in pairwise(capacities)]
    count = min(len(differences), int(merges) if merges >= 1 else max(1, round(merges * len(differences))))
    order = sorted(range(len(differences)), key=lambda i: (-differences[i], i))
    return sorted(order[:count])


def merge(blocks: Sequence[Block], capacities: Sequence[int], merges: float) -> list[Block]:
    """`blocks` with chosen neighbours joined; pairs that share a block become one of three.

    The first and the last block with weights stay alone: stem and classifier have bit-widths of their own. What stands
    between two blocks and has no weights goes with them.

    Args:
        blocks: (name, nodes) in the order of execution.
        capacities: number of weights of each; 0 for what has none.
        merges: see `pairs_to_merge`.

    Raises:
        ValueError: see `pairs_to_merge`.
    """
    inner = [i for i, capacity in enumerate(capacities) if capacity][1:-1]
    chosen = [inner[i] for i in pairs_to_merge([capacities[i] for i in inner], merges)]
    joined = {k for i in chosen for k in range(i + 1, inner[inner.index(i) + 1] + 1)}  # those that join the one before
    merged: list[Block] = []
    for i, (name, nodes) in enumerate(blocks):
        if i not in joined:
            merged.append((name, list(nodes)))
            continue
        first, before = merged[-1]
        merged[-1] = (f"{first}+{name}" if capacities[i] else first, before + list(nodes))
    return merged
