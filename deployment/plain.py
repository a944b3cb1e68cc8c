"""A student in PyTorch's own operators, for `torch.export`, `torch.compile` and whatever takes an `nn.Module`.

The quantizers of a student learn: autograd functions, soft roundings, ranges. Here what they decided is constant.
PyTorch's interchange of quantized graphs (PT2E) left torch for torchao, whose quantizers annotate a graph and choose
scales themselves; it takes no given roundings, so nothing is exported in its form.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from deployment.integers import activation_grids, integer_weights
from quantizers.layer import ActivationSite, QuantizedLayer, own_layout


class FixedGrid(nn.Module):
    """`(clip(round(x / scale), lowest, highest)) * scale`: fake quantization with constants. Shape of the input."""

    scale: Tensor

    def __init__(self, scale: float, lowest: int, highest: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.lowest, self.highest = lowest, highest

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp((x / self.scale).round(), self.lowest, self.highest) * self.scale


@torch.no_grad()
def plain(student: fx.GraphModule) -> fx.GraphModule:
    """A copy with ordinary layers that hold the dequantized weights, and constants for quantizers: bitwise the same.

    Raises:
        ValueError: if the student has modules that could not be traced, which hold quantizers of their own.
    """
    copied = copy.deepcopy(student).eval().requires_grad_(False)
    weights, grids = integer_weights(copied), activation_grids(copied)
    found = [(path, m) for path, m in copied.named_modules() if isinstance(m, QuantizedLayer | ActivationSite)]
    called = {str(node.target) for node in copied.graph.nodes if node.op == "call_module"}
    for path, module in found:
        if path not in called:
            raise ValueError(
                f"student: expected a network that can be traced, got a quantizer inside another module, {path}"
            )
        parent, _, name = path.rpartition(".")
        setattr(copied.get_submodule(parent), name, _constant(path, module, weights, grids))
    copied.recompile()
    return copied


def _constant(path: str, module: nn.Module, weights: dict[str, Any], grids: dict[str, Any]) -> nn.Module:
    if isinstance(module, ActivationSite):
        if path not in grids:
            return nn.Identity()
        scale, zero_point, _, low, high = grids[path]
        return FixedGrid(scale, low - zero_point, high - zero_point)
    assert isinstance(module, QuantizedLayer)
    layer: Any = module.layer
    if path in weights:
        integers, scale, zero_point, *_ = weights[path]
        layer.weight = nn.Parameter(own_layout(layer, (integers - zero_point) * scale), requires_grad=False)
    return layer
