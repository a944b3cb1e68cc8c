"""What a protocol asks of every quantizer: weights around zero, scales that are powers of two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from quantizers.base import Quantizer
from quantizers.grid import Grid
from quantizers.protocol import Protocol
from quantizers.ranges import Observer, Range

Factory = Callable[..., Quantizer]


class PowerOfTwo(Range):
    """Another range with its scale moved to the nearest power of two; the lower end of the range stays where it is."""

    def __init__(self, range: Range) -> None:
        self.range = range

    def fit(self, x: Tensor, grid: Grid, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
        """See `Range.fit`; `settle` comes when the quantizer takes it."""
        return self.range.fit(x, grid, channel_axis)

    def observer(self, grid: Grid) -> Observer:
        """That of the other range."""
        return self.range.observer(grid)

    def settle(self, scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The nearest power of two, and the zero point that goes with it."""
        rounded = torch.exp2(scale.log2().round())
        moved = (grid.low + (zero_point - grid.low) * scale / rounded).round().clamp(grid.low, grid.high)
        return rounded, zero_point if grid.symmetric else moved


def constrained(protocol: Protocol, weight: Factory, activation: Factory) -> tuple[Factory, Factory]:
    """Both factories with the protocol's constraints as further arguments.

    Raises:
        ValueError: where a factory does not state its `range` as `functools.partial` does, or learns its scale.
    """
    if protocol.symmetric_weights:
        weight = partial(weight, symmetric=True)
    if not protocol.power_of_two:
        return weight, activation
    return _power_of_two("weight", weight), _power_of_two("activation", activation)


def _power_of_two(name: str, factory: Factory) -> Factory:
    inner, stated = None, factory
    while inner is None and isinstance(stated, partial):  # partials of a subclass, as Hydra makes them, are nested
        inner, stated = stated.keywords.get("range"), stated.func
    if not isinstance(inner, Range):
        raise ValueError(
            f"{name}: expected a partial with a range, which protocol.power_of_two rounds, got {factory!r}"
        )

    def build(*args: object, **kwargs: object) -> Quantizer:
        quantizer = factory(*args, **kwargs | {"range": PowerOfTwo(inner)})
        if any(group["kind"] == "scale" for group in quantizer.parameter_groups()):
            raise ValueError(
                f"{name}: expected a quantizer with a fixed scale, which protocol.power_of_two needs, got "
                f"{type(quantizer).__name__}; choose activation=fixed and weight=nearest or adaround"
            )
        return quantizer

    return build
