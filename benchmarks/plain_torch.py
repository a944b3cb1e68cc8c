"""A unit of a student in plain torch, as research code writes it: what our quantizers and QDrop are timed against.

AdaRound's soft weights, LSQ's activations and QDrop's mixing are composed of torch's own operations, each of which
autograd records; nothing of ours is called. Layers with other quantizers are refused.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quantizers.adaround import AdaRound
from quantizers.layer import ActivationSite, QuantizedLayer
from quantizers.lsq import LSQ


def round_straight_through(x: Tensor) -> Tensor:
    """round(x) whose gradient is that of x."""
    return (x.round() - x).detach() + x


def mixed(quantized: Tensor, x: Tensor, drop: float) -> Tensor:
    """QDrop: each element float with probability `drop`."""
    return torch.where(torch.rand_like(x) < drop, x, quantized)


class PlainLSQ(nn.Module):
    """Fake quantization with a learned step, and its dropping while in training."""

    def __init__(self, quantizer: LSQ, drop: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(quantizer.scale.detach().clone())
        zero_point, grid = float(quantizer.zero_point), quantizer.grid
        self.low, self.high, self.levels, self.drop = grid.low - zero_point, grid.high - zero_point, grid.high, drop

    def forward(self, x: Tensor) -> Tensor:
        share = 1 / (x.numel() * self.levels) ** 0.5
        scale = (self.scale - self.scale * share).detach() + self.scale * share
        quantized = round_straight_through(torch.clamp(x / scale, self.low, self.high)) * scale
        return mixed(quantized, x, self.drop) if self.training and self.drop else quantized


class PlainAdaRound(nn.Module):
    """A convolution or linear layer with softly rounded weights."""

    def __init__(self, layer: Any, quantizer: AdaRound) -> None:
        super().__init__()
        self.layer, self.scale, self.zero_point = layer, quantizer.scale, quantizer.zero_point
        self.low, self.high = quantizer.grid.low, quantizer.grid.high
        self.alpha = nn.Parameter(quantizer.V.detach().clone())

    def soft(self) -> Tensor:
        """h(alpha), between 0 and 1."""
        return torch.clamp(torch.sigmoid(self.alpha) * 1.2 - 0.1, 0, 1)

    def penalty(self, beta: float) -> Tensor:
        """Zero once every rounding is decided."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).mean()

    def forward(self, x: Tensor) -> Tensor:
        q = torch.floor(self.layer.weight / self.scale) + self.soft() + self.zero_point
        weight = (torch.clamp(q, self.low, self.high) - self.zero_point) * self.scale
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        chosen = self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups
        return F.conv2d(x, weight, self.layer.bias, *chosen)


def plain(unit: fx.GraphModule, drop: float) -> fx.GraphModule:
    """A copy of a student's unit in which every quantizer is a plain one.

    Raises:
        ValueError: naming a quantizer that is neither AdaRound nor LSQ.
    """
    unit = copy.deepcopy(unit)
    for path, module in list(unit.named_modules()):
        if isinstance(module, QuantizedLayer):
            unit.set_submodule(path, PlainAdaRound(module.layer, _as(AdaRound, module.weight_quantizer, path)))
        elif isinstance(module, ActivationSite):
            unit.set_submodule(path, PlainLSQ(_as(LSQ, module.quantizer, path), drop))
    return unit


def _as(kind: type[Any], quantizer: Any, path: str) -> Any:
    if not isinstance(quantizer, kind):
        raise ValueError(
            f"{path}: expected {kind.__name__}, got {type(quantizer).__name__}; choose weight=adaround activation=lsq"
        )
    return quantizer


class PlainStep:
    """One step of QDrop on a unit: batch, mixing of inputs, forward, loss, backward, Adam.

    Args:
        unit: of a student, with AdaRound and LSQ.
        inputs: of the unit in the student and in the float network, one tensor each.
        target: what the unit should give.
        batch_size: images a step.
        drop: QDrop's probability; 0 switches it off.
    """

    def __init__(
        self, unit: fx.GraphModule, inputs: tuple[Tensor, Tensor], target: Tensor, *, batch_size: int, drop: float
    ) -> None:
        self.unit = plain(unit, drop).train()
        self.inputs, self.target, self.batch_size, self.drop = inputs, target, batch_size, drop
        self.layers = [m for m in self.unit.modules() if isinstance(m, PlainAdaRound)]
        sites = [m for m in self.unit.modules() if isinstance(m, PlainLSQ)]
        parameters = [p for m in (*self.layers, *sites) for p in m.parameters(recurse=False)]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def __call__(self) -> None:
        index = torch.randint(len(self.target), (self.batch_size,))
        x = self.inputs[0][index]
        if self.drop:
            x = mixed(x, self.inputs[1][index], self.drop)
        error = (self.unit(x)[0] - self.target[index]).square().sum(1).mean()
        loss = error + 0.1 * torch.stack([layer.penalty(11.0) for layer in self.layers]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
