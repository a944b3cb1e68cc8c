"""A unit of a student in plain torch, as research code writes it: what our quantizers and QDrop are timed against.

AdaRound's soft weights, AdaQuant's free ones, LSQ's activations and QDrop's mixing are composed of torch's own
operations, each of which autograd records; nothing of ours is called. Layers with other quantizers are refused.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quantizers.adaquant import AdaQuant
from quantizers.adaround import AdaRound
from quantizers.layer import ActivationSite, QuantizedLayer
from quantizers.lsq import LSQ


def round_straight_through(x: Tensor) -> Tensor:
    """round(x) whose gradient is that of x."""
    return (x.round() - x).detach() + x


def clipped(q: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp, but that what stands on a bound still learns, which depends on torch's release."""
    return torch.where(q > high, high, torch.where(q < low, low, q))


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


class PlainLayer(nn.Module, ABC):
    """A convolution or linear layer with a quantized weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    @abstractmethod
    def quantized(self) -> Tensor:
        """The weight, on its grid or between two of its levels."""

    def penalty(self, beta: float) -> Tensor:
        """What is added to the loss."""
        return torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized()
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        chosen = self.layer.stride, self.layer.padding, self.layer.dilation, self.layer.groups
        return F.conv2d(x, weight, self.layer.bias, *chosen)


class PlainAdaRound(PlainLayer):
    """Softly rounded weights."""

    def __init__(self, layer: Any, quantizer: AdaRound) -> None:
        super().__init__(layer)
        self.scale, self.zero_point = quantizer.scale, quantizer.zero_point
        self.low, self.high = quantizer.grid.low, quantizer.grid.high
        self.alpha = nn.Parameter(quantizer.V.detach().clone())

    def soft(self) -> Tensor:
        """h(alpha), between 0 and 1."""
        return torch.clamp(torch.sigmoid(self.alpha) * 1.2 - 0.1, 0, 1)

    def penalty(self, beta: float) -> Tensor:
        """Zero once every rounding is decided."""
        return (1 - (2 * self.soft() - 1).abs().pow(beta)).mean()

    def quantized(self) -> Tensor:
        q = torch.floor(self.layer.weight / self.scale) + self.soft() + self.zero_point
        return (torch.clamp(q, self.low, self.high) - self.zero_point) * self.scale


class PlainAdaQuant(PlainLayer):
    """Free weights on a learned grid, straight through."""

    def __init__(self, layer: Any, quantizer: AdaQuant) -> None:
        super().__init__(layer)
        self.low, self.high = quantizer.grid.low, quantizer.grid.high
        started = quantizer.weight, quantizer.scale, quantizer.zero_point
        self.weight, self.scale, self.zero_point = (nn.Parameter(t.detach().clone()) for t in started)

    def quantized(self) -> Tensor:
        zero_point = round_straight_through(clipped(self.zero_point, self.low, self.high))
        q = clipped(round_straight_through(self.weight / self.scale) + zero_point, self.low, self.high)
        return (q - zero_point) * self.scale


WEIGHTS: dict[type[Any], type[Any]] = {AdaRound: PlainAdaRound, AdaQuant: PlainAdaQuant}
ACTIVATIONS: dict[type[Any], type[Any]] = {LSQ: PlainLSQ}


def plain(unit: fx.GraphModule, drop: float) -> fx.GraphModule:
    """A copy of a student's unit in which every quantizer is a plain one.

    Raises:
        ValueError: naming a quantizer that is none of AdaRound, AdaQuant and LSQ.
    """
    unit = copy.deepcopy(unit)
    for path, module in list(unit.named_modules()):
        if isinstance(module, QuantizedLayer):
            quantizer = module.weight_quantizer
            unit.set_submodule(path, _plain_of(WEIGHTS, quantizer, path)(module.layer, quantizer))
        elif isinstance(module, ActivationSite):
            unit.set_submodule(path, _plain_of(ACTIVATIONS, module.quantizer, path)(module.quantizer, drop))
    return unit


def _plain_of(kinds: dict[type[Any], type[Any]], quantizer: Any, path: str) -> type[Any]:
    if type(quantizer) not in kinds:
        raise ValueError(
            f"{path}: expected {' or '.join(kind.__name__ for kind in kinds)}, got {type(quantizer).__name__}; choose "
            "weight=adaround or weight=adaquant, and activation=lsq"
        )
    return kinds[type(quantizer)]


class PlainStep:
    """One step of QDrop on a unit: batch, mixing of inputs, forward, loss, backward, Adam.

    Args:
        unit: of a student, with AdaRound or AdaQuant, and LSQ.
        inputs: of the unit in the student and in the float network, one tensor each.
        target: what the unit should give.
        batch_size: images a step.
        drop: QDrop's probability; 0 switches it off.
        power: of the error's absolute values.
        biases: whether these are learned too.
    """

    def __init__(
        self,
        unit: fx.GraphModule,
        inputs: tuple[Tensor, Tensor],
        target: Tensor,
        *,
        batch_size: int,
        drop: float,
        power: float = 2.0,
        biases: bool = False,
    ) -> None:
        self.unit = plain(unit, drop).train()
        self.inputs, self.target, self.batch_size, self.drop, self.power = inputs, target, batch_size, drop, power
        self.layers = [m for m in self.unit.modules() if isinstance(m, PlainLayer)]
        sites = [m for m in self.unit.modules() if isinstance(m, PlainLSQ)]
        parameters = [p for m in (*self.layers, *sites) for p in m.parameters(recurse=False)]
        if biases:
            parameters += [m.layer.bias.requires_grad_() for m in self.layers if m.layer.bias is not None]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def __call__(self) -> None:
        index = torch.randint(len(self.target), (self.batch_size,))
        x = self.inputs[0][index]
        if self.drop:
            x = mixed(x, self.inputs[1][index], self.drop)
        difference = self.unit(x)[0] - self.target[index]
        powers = difference.square() if self.power == 2.0 else difference.abs().pow(self.power)
        loss = powers.sum(1).mean() + 0.1 * torch.stack([layer.penalty(11.0) for layer in self.layers]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
