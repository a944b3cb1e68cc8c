"""QDrop: quantization that is switched off at random, element by element, while a block is being learned.

Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR 2022,
arXiv 2203.05740, eq. 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class _EitherOf(torch.autograd.Function):
    """torch.where of two floating-point tensors of one type, forward and backward.

    On CPUs torch.where branches at every element, which a random mask makes unpredictable; the same choice among bits
    is made for several elements at a time, three to five times faster.
    """

    @staticmethod
    def forward(ctx: Any, mask: Tensor, x: Tensor, otherwise: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        if mask.device.type != "cpu" or x.dtype != otherwise.dtype:
            return torch.where(mask, x, otherwise)
        taken, left = _bits(x), _bits(otherwise)
        return (taken ^ left).bitwise_and_(_spread(mask, taken)).bitwise_xor_(left).view(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (mask,) = ctx.saved_tensors
        if mask.device.type != "cpu":
            return None, torch.where(mask, grad, 0), torch.where(mask, 0, grad)
        bits = _bits(grad)
        spread = _spread(mask, bits)
        taken = (bits & spread).view(grad.dtype)
        return None, taken, spread.bitwise_not_().bitwise_and_(bits).view(grad.dtype)


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers."""
    return x.view(BITS[x.element_size()])


def _spread(mask: Tensor, bits: Tensor) -> Tensor:
    """All bits of an element set where the mask is true, none elsewhere."""
    return mask.to(bits.dtype).neg_()


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
    mask = random_mask(x, probability, generator)
    return _EitherOf.apply(mask, x, quantized)  # pyright: ignore[reportReturnType]


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
