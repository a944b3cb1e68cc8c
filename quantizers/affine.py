"""Uniform affine fake quantization as pure functions: `s * (clip(round(x / s) + z, low, high) - z)`.

The clip is applied to `round(x / s)` with the bounds shifted by -z. That is the same number, since everything in it is
an integer below 2^24, and two operations fewer. Rounding is half to even and `x / s` a true division, as in ONNX
QuantizeLinear. All arguments are float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantizers.grid import Grid

SMALLEST_SCALE = 1e-12


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class _ClippedRounding(torch.autograd.Function):
    """clip(round(x), lowest, highest). torch.clamp with tensor bounds would halve the gradient on the end levels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        ctx.save_for_backward(x, lowest, highest)
        return torch.clamp(x.round(), lowest, highest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, lowest, highest = ctx.saved_tensors
        rounded = x.round()
        below, above = rounded < lowest, rounded > highest
        return (
            grad * ~(below | above) if ctx.needs_input_grad[0] else None,
            (grad * below).sum_to_size(lowest.shape) if ctx.needs_input_grad[1] else None,
            (grad * above).sum_to_size(highest.shape) if ctx.needs_input_grad[2] else None,
        )


class _ClampPositive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, scale: Tensor) -> Tensor:
        return scale.clamp(min=SMALLEST_SCALE)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


class _ClosedClamp(torch.autograd.Function):
    """torch.clamp passes the gradient of an element on a bound in some releases and stops it in others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lowest: float, highest: float) -> Tensor:
        clamped = x.clamp(lowest, highest)
        ctx.save_for_backward(clamped == x)
        return clamped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


def between(x: Tensor, lowest: float, highest: float) -> Tensor:
    """clip(x, lowest, highest); what stands on a bound still learns, so that it can return."""
    return _ClosedClamp.apply(x, lowest, highest)  # pyright: ignore[reportReturnType]


def within(values: Tensor, position: Tensor, lowest: float, highest: float) -> Tensor:
    """`values` where lowest < position < highest, zero elsewhere: the gradient of a clip.

    One pass, where two comparisons and a product with their outcome take six on a CPU. What stands at a NaN passes.
    """
    return torch.ops.aten.hardtanh_backward(values, position, lowest, highest)


def positive(scale: Tensor) -> Tensor:
    """At least 1e-12; backward is the identity, so a scale that an update took below zero can return."""
    return _ClampPositive.apply(scale)  # pyright: ignore[reportReturnType]


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; backward is the identity (Bengio et al., arXiv 1308.3432)."""
    return _RoundStraightThrough.apply(x)  # pyright: ignore[reportReturnType]


def multiples(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """How many steps each element is away from zero: `q - z`, integral, shape of `x`.

    Differentiable with respect to `x`, `scale` and (through the clipped elements) `zero_point`; the gradient with
    respect to `x` is zero where the rounded element was clipped. Times `scale` it is the fake-quantized tensor.
    """
    return rounded_positions(x / scale, zero_point, grid)


def rounded_positions(position: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """`multiples` of elements that are given in steps from zero."""
    return _ClippedRounding.apply(position, grid.low - zero_point, grid.high - zero_point)  # pyright: ignore[reportReturnType]


def from_bounds(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The smallest scale, and its zero point, with which the grid covers zero and `low..high`, all (C,).

    A one-sided grid ignores `low`.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if grid.one_sided:
        scale = high / grid.high
    elif grid.symmetric:
        scale = torch.maximum(high / grid.high, low / grid.low)
    else:
        scale = (high - low) / (grid.high - grid.low)
    widest = scale.max()
    scale = torch.where(scale > 0, scale, torch.where(widest > 0, widest, 1.0)).clamp(min=SMALLEST_SCALE)
    if grid.symmetric:
        return scale, torch.zeros_like(scale)
    return scale, (grid.low - low / scale).round().clamp(grid.low, grid.high)
