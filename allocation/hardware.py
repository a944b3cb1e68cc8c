"""What a backend can compute: for each kind of operator the pairs of weight and activation widths, and what a change of
widths between two operators costs.

Jiang et al. (HAGO), "Automated Backend-Aware Post-Training Quantization", arXiv 2103.14949: one description of the
hardware decides what may be chosen. Theirs lists data types of inputs and outputs; ours pairs of widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from quantizers.layer import TRANSPOSED
from quantizers.protocol import FLOAT, check_width

KINDS = ("convolution", "depthwise", "linear")
Pair = tuple[int, int]  # (weight bits, activation bits)


class Hardware:
    """The pairs that a backend supports.

    Args:
        name: stands in records.
        pairs: (weight bits, activation bits) for every operator; None: any.
        operators: kinds ("convolution", "depthwise", "linear") that support other pairs than the rest.
        conversion: milliseconds for a million elements of a tensor between operators whose activations differ in
            width; part of the latency.

    Raises:
        ValueError: if a kind is unknown, a width is none, or `conversion` is negative.
    """

    def __init__(
        self,
        name: str,
        pairs: Iterable[Sequence[int]] | None = None,
        *,
        operators: Mapping[str, Iterable[Sequence[int]]] | None = None,
        conversion: float = 0.0,
    ) -> None:
        unknown = sorted(set(operators or {}) - set(KINDS))
        if unknown:
            raise ValueError(f"hardware.operators: expected kinds among {', '.join(KINDS)}, got {unknown}")
        if conversion < 0:
            raise ValueError(f"hardware.conversion: expected milliseconds of at least 0, got {conversion}")
        self.name = name
        self.conversion = float(conversion)
        self.pairs: dict[str, frozenset[Pair] | None] = {kind: _pairs(pairs) for kind in KINDS}
        self.pairs |= {str(kind): _pairs(own) for kind, own in (operators or {}).items()}

    def allows(self, kind: str, weight: int, activation: int) -> bool:
        """Whether an operator runs at these widths; a side that stays in float (32) fits any pair with the other."""
        known = self.pairs[kind]
        if known is None:
            return True
        return any(weight in (w, FLOAT) and activation in (a, FLOAT) for w, a in known)


def kind_of(layer: nn.Module) -> str:
    """Which of `KINDS` a convolution or linear layer is."""
    if isinstance(layer, nn.Linear):
        return "linear"
    channels = int(layer.out_channels if isinstance(layer, TRANSPOSED) else layer.in_channels)  # type: ignore[arg-type]
    return "depthwise" if layer.groups == channels > 1 else "convolution"


def _pairs(pairs: Iterable[Sequence[int]] | None) -> frozenset[Pair] | None:
    if pairs is None:
        return None
    found = [tuple(int(bits) for bits in pair) for pair in pairs]
    for pair in found:
        if len(pair) != 2:
            raise ValueError(f"hardware.pairs: expected [weight bits, activation bits] each, got {list(pair)}")
        for bits in pair:
            check_width("hardware.pairs", bits)
    if not found:
        raise ValueError("hardware.pairs: expected at least one pair, or null for any, got none")
    return frozenset((w, a) for w, a in found)
