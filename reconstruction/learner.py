"""How a student takes a step of fine-tuning: what is learned, at which rate, and how far an update goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from quantizers.base import Quantizer
from quantizers.fold import FrozenNorm
from quantizers.layer import QuantizedLayer, quantized_layers
from reconstruction.inundation import Inundation

Learned = Literal["weights", "biases", "norms"]
Schedule = Literal["constant", "cosine", "staircase"]
STAIRS = 4  # of GDFQ: x0.1 at a quarter, half and three quarters of the run
START = "initial_lr"


def learning_rate(schedule: Schedule, done: int, steps: int) -> float:
    """Factor on the learning rate after `done` of `steps` steps, whose number is the period.

    "constant"; "cosine" from 1 towards 0; "staircase": x0.1 at a quarter, half and three quarters.
    """
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done / steps))
    return 0.1 ** (STAIRS * done // steps) if schedule == "staircase" else 1.0


def trained_weights(student: fx.GraphModule) -> list[tuple[Quantizer, Tensor]]:
    """The weights that their own quantizers train.

    Raises:
        ValueError: if there are none.
    """
    layers = [layer for _, layer in quantized_layers(student)]
    found: list[tuple[Quantizer, Tensor]] = [weight for layer in layers for weight in _trained(layer)]
    if not found:
        kind = type(layers[0].weight_quantizer).__name__ if layers else "no quantized layer"
        raise ValueError(
            f"learn: expected a rounding that trains the weight itself, got {kind}; choose weight=straight_through"
        )
    return found


class Learner:
    """Learns parts of a student in place; the rest of it stays as it is.

    Args:
        optimizer: makes the optimizer from parameter groups.
        learn: "weights" that their quantizers train (weight=straight_through, weight=adaquant), "biases" of the
            quantized layers, "norms": scale and shift of normalisations that no layer could take in.
        schedule: see `learning_rate`.
        inundation: enlarges the updates of weights, of an optimizer whose step is proportional to its rate, as those of
            SGD and Adam are; None: they stay as the optimizer makes them.

    Raises:
        ValueError: if a choice is unknown.
    """

    def __init__(
        self,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        learn: Sequence[Learned] = ("weights", "biases", "norms"),
        schedule: Schedule = "cosine",
        inundation: Inundation | None = None,
    ) -> None:
        unknown = set(learn) - set(get_args(Learned))
        if unknown or not learn:
            raise ValueError(f"learn: expected some of {', '.join(get_args(Learned))}, got {list(learn)}")
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule: expected one of {', '.join(get_args(Schedule))}, got {schedule!r}")
        self.learn = list(learn)
        self.schedule: Schedule = schedule
        self.inundation = inundation
        self.weights: list[tuple[Quantizer, Tensor]] = []
        self.others: list[Tensor] = []
        self._optimizer_factory = optimizer

    def bind(self, student: fx.GraphModule) -> None:
        """Let what is to be learned require gradients, and nothing else.

        Raises:
            ValueError: if weights are to be learned and no quantizer trains its own.
        """
        student.requires_grad_(False)
        layers = [layer for _, layer in quantized_layers(student)]
        self.weights = trained_weights(student) if "weights" in self.learn else []
        self.others = []
        if "biases" in self.learn:
            self.others += [layer.bias for layer in layers if layer.bias is not None]
        if "norms" in self.learn:
            norms = [module for module in student.modules() if isinstance(module, FrozenNorm)]
            self.others += [parameter for norm in norms for parameter in (norm.scale, norm.shift)]
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def parameters(self) -> list[Tensor]:
        """All that is learned."""
        return [*(weight for _, weight in self.weights), *self.others]

    def optimizer(self) -> Optimizer:
        """A new optimizer of all that is learned."""
        made = self._optimizer_factory([{"params": self.parameters()}])
        for group in made.param_groups:
            group.setdefault(START, group["lr"])
        return made

    def step(self, optimizer: Optimizer, advance: Callable[[], Any], done: int, steps: int) -> None:
        """Set the rate of step `done` of `steps`, let `advance` take the optimizer's step, and enlarge it if asked."""
        for group in optimizer.param_groups:
            group["lr"] = group[START] * learning_rate(self.schedule, done, steps)
        if self.inundation is None:
            advance()
            return
        self._inundate(self.inundation, optimizer, advance)

    @torch.no_grad()
    def _inundate(self, inundation: Inundation, optimizer: Optimizer, advance: Callable[[], Any]) -> None:
        """Take the step at a rate of 1 and scale it afterwards: a weight in float32 swallows updates far below it."""
        before = {parameter: parameter.detach().clone() for parameter in self.parameters()}
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 1.0
        advance()
        updates: dict[Tensor, Tensor] = {}
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            updates |= {parameter: rate * (parameter - before[parameter]) for parameter in group["params"]}
        for quantizer, weight in self.weights:
            inundation(quantizer, weight, before[weight], updates[weight])
        for parameter in self.others:
            parameter.copy_(before[parameter] + updates[parameter])


def _trained(layer: QuantizedLayer) -> list[tuple[Quantizer, nn.Parameter]]:
    quantizer = layer.weight_quantizer
    groups = [group for group in quantizer.parameter_groups() if group.get("kind") == "weight"]
    return [(quantizer, parameter) for group in groups for parameter in group["params"]]
