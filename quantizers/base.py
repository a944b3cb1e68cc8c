"""What every quantizer has in common: a grid, a scale, a zero point, and the life cycle initialize, learn, harden."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.grid import Grid
from quantizers.ranges import Range


class Quantizer(nn.Module, ABC):
    """Maps a float tensor onto an integer grid. Lifecycle: initialize -> learn (soft) -> harden.

    Parameters and buffers exist from construction with their final shapes and are filled in place, so an optimiser
    made before `initialize` stays valid. All arithmetic is float32, also under autocast; the result has the dtype of
    the input.

    Args:
        grid: the integers to use.
        range: how scale and zero point are chosen.
        weight: the weight to quantize, which gives shape and device; None for an activation (per tensor).
        channel_axis: axis with a scale of its own per index; None for one scale.
        learn_scale: whether `scale` is a Parameter.
    """

    scale: Tensor  # () or (1, .., C, .., 1)
    zero_point: Tensor  # the same shape, integral valued

    def __init__(
        self,
        grid: Grid,
        range: Range,
        *,
        weight: Tensor | None = None,
        channel_axis: int | None = None,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.range = range
        self.channel_axis = channel_axis
        shape = () if weight is None else _scale_shape(weight, channel_axis)
        device = None if weight is None else weight.device
        scale = torch.ones(shape, device=device)
        if learn_scale:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(shape, device=device))

    @abstractmethod
    def multiples(self, x: Tensor) -> Tensor:
        """`q - z` for a float32 `x`: integral once hardened, soft before where the method is soft."""

    def hard_multiples(self, x: Tensor) -> Tensor:
        """`q - z` as `harden` would make it, without changing any state."""
        return self.multiples(x)

    def step(self) -> Tensor:
        """The positive scale that `forward` multiplies with."""
        return self.scale

    def offset(self) -> Tensor:
        """The integral zero point that `forward` uses."""
        return self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake quantization of `x`, differentiable as the method needs it; shape and dtype of `x`."""
        with torch.autocast(x.device.type, enabled=False):
            return self.fake_quantize(x.float()).to(x.dtype)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """`forward` for float32 outside autocast."""
        return self.multiples(x) * self.step()

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Choose the range on `x` (the weight, or one batch of activations) and fill the method's own state."""
        x = x.detach().float()
        self.set_range(*self.range.fit(x, self.grid, self.channel_axis))
        self.initialize_state(x)

    def initialize_state(self, x: Tensor) -> None:
        """Fill what the method learns, in place, after the range was set; called without gradients."""

    @torch.no_grad()
    def set_range(self, scale: Tensor, zero_point: Tensor) -> None:
        """Write scale and zero point in place; shapes `()`, `(C,)` or that of `self.scale`.

        Raises:
            ValueError: if a number of channels differs, a scale is not positive and finite, or a zero point is not an
                integer of the grid.
        """
        for name, value in (("scale", scale), ("zero_point", zero_point)):
            if value.numel() not in (1, self.scale.numel()):
                raise ValueError(f"{name}: expected 1 or {self.scale.numel()} elements, got {tuple(value.shape)}")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(f"scale: expected positive and finite, got {float(scale.min())} to {float(scale.max())}")
        on_grid = (zero_point == zero_point.round()) & (zero_point >= self.grid.low) & (zero_point <= self.grid.high)
        if not bool(on_grid.all()):
            raise ValueError(
                f"zero_point: expected integers from {self.grid.low} to {self.grid.high}, "
                f"got {float(zero_point.min())} to {float(zero_point.max())}"
            )
        scale, zero_point = self.range.settle(scale, zero_point, self.grid)
        self.scale.copy_(scale.flatten().expand(self.scale.numel()).view_as(self.scale))
        self.zero_point.copy_(zero_point.flatten().expand(self.scale.numel()).view_as(self.scale))

    @torch.no_grad()
    def rescale(self, factor: Tensor) -> None:
        """Follow a weight whose output channels are multiplied by `factor` (C,): scales move, integers stay.

        Raises:
            ValueError: unless every output channel has a scale of its own and `factor` is positive.
        """
        if self.channel_axis is None or factor.numel() != self.scale.numel():
            raise ValueError(
                f"channel_axis: expected a scale for each of {factor.numel()} output channels, got "
                f"{self.scale.numel()}; set weight.channel_axis=0, or leave out the correction that rescales channels"
            )
        if not bool((torch.isfinite(factor) & (factor > 0)).all()):
            raise ValueError(
                f"factor: expected positive and finite, got {float(factor.min())} to {float(factor.max())}"
            )
        factor = factor.view_as(self.scale).to(self.scale)
        moved = self.scale * factor
        if not torch.equal(self.range.settle(moved, self.zero_point, self.grid)[0], moved):
            raise ValueError(
                "factor: expected powers of two, as the scales are (protocol.power_of_two), got "
                f"{float(factor.min())} to {float(factor.max())}; leave out the correction that rescales channels"
            )
        self.scale.copy_(moved)
        self.rescale_state(factor)

    def rescale_state(self, factor: Tensor) -> None:
        """Multiply what the method keeps in the unit of the weight, in place; `factor` broadcasts to the weight."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups with keys `params`, `lr`, `anneal` ("constant", "cosine" or "linear") and `kind`
        ("rounding", "scale" or "weight"); empty if nothing is learned. Read after the range was set.

        A group may also state Adam's `betas` and `eps`; `bounds`, the interval that its parameters are projected onto
        after each step; `over_steps`: true where `lr` is to be divided by the number of steps; and `stated_for`: the
        steps that `lr` is meant for, where these are not the reconstruction's.
        """
        return []

    def regularizer(self, progress: float) -> Tensor:
        """Mean penalty on undecided roundings, a scalar; `progress` runs from 0 to 1. Zero where none is needed."""
        return self.scale.new_zeros(())

    def harden(self) -> None:
        """Make every decision final, in place. Idempotent."""

    def soft_fraction(self) -> float:
        """Share of roundings that are neither up nor down."""
        return 0.0

    @torch.no_grad()
    def integers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Int32 `q`, scale and zero point of the hardened quantizer, with `(q - z) * s == forward(x)` bit for bit."""
        scale, zero_point = self.step().detach().clone(), self.offset().detach().clone()
        return (self.hard_multiples(x.float()) + zero_point).to(torch.int32), scale, zero_point

    def extra_repr(self) -> str:
        """The grid, for `print(module)`."""
        return f"{self.grid}, channel_axis={self.channel_axis}"


def _scale_shape(weight: Tensor, channel_axis: int | None) -> tuple[int, ...]:
    if channel_axis is None:
        return ()
    if not -weight.dim() <= channel_axis < weight.dim():
        raise ValueError(
            f"channel_axis: expected an axis of a weight of shape {tuple(weight.shape)}, got {channel_axis}; "
            "use 0 for convolution and linear layers, None for one scale"
        )
    axis = channel_axis % weight.dim()
    return tuple(size if i == axis else 1 for i, size in enumerate(weight.shape))
