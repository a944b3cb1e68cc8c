"""One call in a traced graph, with the moments that go into it.

Moments are held as a pair of tensors with the rank of the feature map, and with size 1 along each axis on which they do
not vary: (1, C, 1, 1) as a rule. They are float64 and stay on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from quantizers.operators import Operators
from synthesis.moments import Moments


class Call(NamedTuple):
    """One node of kind call_module, call_function or call_method; `values` are those of all nodes before it."""

    node: fx.Node
    operators: Operators
    values: dict[fx.Node, Any]

    @property
    def name(self) -> str:
        """The operator: "maxpool2d" for the module, the function and the method."""
        return self.operators.name(self.node)

    @property
    def module(self) -> Any:
        """None for functions and methods."""
        return self.operators.module(self.node)

    @property
    def first(self) -> Any:
        """The first argument as it stands in the graph."""
        return self.node.args[0] if self.node.args else self.node.kwargs["input"]

    @property
    def source(self) -> Moments:
        """The moments of the first argument."""
        if not isinstance(self.first, fx.Node) or not isinstance(self.values[self.first], Moments):
            raise self.unknown()
        return self.values[self.first]

    @property
    def source_shape(self) -> tuple[int, ...]:
        return self.first.meta["shape"]

    @property
    def maps(self) -> Moments:
        """The moments of the first argument as (1, C, 1, ...), for operators that look at neighbouring positions."""
        source, shape = self.source, self.source_shape
        if len(shape) < 3 or source.mean.numel() != source.mean.shape[1]:
            raise self.unknown()  # values differ from position to position
        return Moments(*(t.expand(1, shape[1], *t.shape[2:]) for t in source))

    def option(self, name: str, position: int, default: Any = None) -> Any:
        """Return an argument of a function, or the attribute of that name of a module."""
        if self.module is not None:
            return getattr(self.module, name, default)
        args, kwargs = self.arguments()
        return kwargs.get(name, args[position] if len(args) > position else default)

    def arguments(self, part: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, each node replaced by its value; `part` 0 or 1 picks means or variances, spread out."""

        def pick(node: fx.Node) -> Any:
            value = self.values[node]
            if part is None:
                return value
            if isinstance(value, Moments):
                return value[part].expand(node.meta["shape"])
            return tuple(m[part] for m in value) if holds_moments(value) else value

        return map_arg((self.node.args, self.node.kwargs), pick)  # type: ignore[return-value]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the operator itself computes."""
        target: Any = self.module if self.node.op == "call_module" else self.node.target
        if self.node.op == "call_method":
            # reshape, because moments that were spread out have other strides than the feature map
            target = getattr(torch.Tensor, "reshape" if target == "view" else target)
        return target(*args, **kwargs)

    def unknown(self) -> ValueError:
        """Return the error for an operator that is not known, or not with such arguments."""
        return ValueError(
            f"network: expected operators through which moments can be propagated, got {self.name!r} at node "
            f"{self.node.name!r} (target {self.node.target!s}); choose a generator whose targets need none of this, "
            "such as generator=zeroq (statistics of BatchNorm), generator=gzsq (of the weights) or generator=noise"
        )


def exact(tensor: Tensor) -> Tensor:
    """Return a parameter or buffer in float64 on the CPU."""
    return tensor.detach().to("cpu", torch.float64)


def constant(value: Any) -> Any:
    """Return a tensor of parameters or numbers as moments without variance, anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return Moments(exact(value), torch.zeros_like(exact(value)))
    return value


def holds_moments(value: Any) -> bool:
    """Whether a value is moments, or a tuple of them (chunk)."""
    return isinstance(value, Moments) or (isinstance(value, tuple) and any(isinstance(v, Moments) for v in value))


def along_channels(vector: Tensor, dims: int) -> Tensor:
    """Return (C,) as (1, C, 1, ...) with `dims` axes."""
    return vector.reshape(1, -1, *(1,) * (dims - 2))


def compact(moments: Moments) -> Moments:
    """Return moments with size 1 along each axis on which neither mean nor variance varies."""
    mean, var = torch.broadcast_tensors(*moments)
    for axis in range(mean.dim()):
        first = [t.narrow(axis, 0, 1) for t in (mean, var)]
        if bool((mean == first[0]).all()) and bool((var == first[1]).all()):
            mean, var = first
    return Moments(mean, var)
