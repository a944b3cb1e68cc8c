"""What is learned in one unit of a student, and how it starts and ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.base import Quantizer
from quantizers.layer import ActivationSite, quantized_layers, sites
from reconstruction.extract import Cutter
from reconstruction.partition import Unit
from reconstruction.schedules import Phase


class Learnables:
    """The quantizers of one unit, with their optimiser groups as they stand before anything is learned.

    Args:
        student: cuts the quantized network, which is calibrated.
        unit: the part of it.
        bias_rates: learning rate of the bias of each quantized layer, by its path; None leaves biases as they are.
        taken: parameters that an earlier unit learns (a layer that runs twice); this unit adds its own.
    """

    def __init__(
        self, student: Cutter, unit: Unit, *, bias_rates: Mapping[str, float] | None, taken: set[Tensor]
    ) -> None:
        targets = [str(node.target) for node in student.members(unit) if node.op == "call_module"]
        modules = {target: student.graph_module.get_submodule(target) for target in targets}
        layers = {
            layer: f"{target}.{path}" if path else target
            for target, module in modules.items()
            for path, layer in quantized_layers(module)
            if layer.enabled
        }
        found = {site: None for module in modules.values() for _, site in sites(module) if site.enabled}
        self.sites: list[ActivationSite] = list(found)
        self.weight_quantizers = [layer.weight_quantizer for layer in layers]
        self._biases: list[Tensor] = []
        weights = [group for quantizer in self.weight_quantizers for group in quantizer.parameter_groups()]
        if bias_rates is not None:
            rates = {layer.bias: bias_rates[path] for layer, path in layers.items() if layer.bias is not None}
            self._biases = list(rates)
            weights += [{"params": [bias], "lr": lr, "anneal": "cosine", "kind": "bias"} for bias, lr in rates.items()]
        activations = [group for site in self.sites for group in site.quantizer.parameter_groups()]
        self._groups = {"weights": _untaken(weights, taken), "activations": _untaken(activations, taken)}
        self._groups["joint"] = self._groups["weights"] + self._groups["activations"]
        sizes = {q: float(sum(p.numel() for p in _rounding(q))) for q in self.weight_quantizers}
        self._shares = {q: size / sum(sizes.values()) for q, size in sizes.items() if size}

    @property
    def quantizers(self) -> list[Quantizer]:
        """All of the unit, weights first."""
        return [*self.weight_quantizers, *(site.quantizer for site in self.sites)]

    def groups(self, phase: Phase) -> list[dict[str, Any]]:
        """Optimiser groups (`params`, `lr`, `anneal`, `kind`) of what `phase` learns; empty where it learns nothing."""
        return self._groups[phase]

    def parameters(self, phase: Phase) -> list[nn.Parameter]:
        """What `phase` learns."""
        return [parameter for group in self.groups(phase) for parameter in group["params"]]

    def regularizer(self, progress: float) -> Tensor | float:
        """Mean penalty over all roundings of the unit; `progress` from 0 to 1."""
        penalty: Tensor | float = 0.0
        for quantizer, share in self._shares.items():
            penalty = penalty + share * quantizer.regularizer(progress)
        return penalty

    def soft_fraction(self) -> float:
        """Share of the unit's roundings that are still undecided."""
        return sum(share * quantizer.soft_fraction() for quantizer, share in self._shares.items())

    def harden(self) -> None:
        """Make every decision final."""
        for quantizer in self.quantizers:
            quantizer.harden()

    def tensors(self) -> list[Tensor]:
        """All that learning the unit changes, in a fixed order: its quantizers, and its biases if they are learned."""
        found = [t for quantizer in self.quantizers for t in quantizer.state_dict(keep_vars=True).values()]
        return [*found, *self._biases]

    def state(self) -> list[Tensor]:
        """A copy of `tensors`."""
        return [tensor.detach().clone() for tensor in self.tensors()]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Write what `state` returned, in place."""
        for tensor, value in zip(self.tensors(), state, strict=True):
            tensor.copy_(value)

    @contextmanager
    def hardened(self, state: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Inside, the unit computes as if it were hardened now, or in `state`; afterwards it is as soft as before."""
        before = self.state()
        try:
            if state is not None:
                self.restore(state)
            self.harden()
            yield
        finally:
            self.restore(before)


def learnables_of(
    student: fx.GraphModule, units: Sequence[Unit], *, bias_rates: Mapping[str, float] | None = None
) -> list[Learnables]:
    """The learnables of every unit; a parameter that several units share belongs to the first."""
    cutter, taken = Cutter(student), set[Tensor]()
    return [Learnables(cutter, unit, bias_rates=bias_rates, taken=taken) for unit in units]


def _rounding(quantizer: Quantizer) -> list[Tensor]:
    groups = quantizer.parameter_groups()
    return [parameter for group in groups if group["kind"] == "rounding" for parameter in group["params"]]


def _untaken(groups: list[dict[str, Any]], taken: set[Tensor]) -> list[dict[str, Any]]:
    left = [{**group, "params": [p for p in group["params"] if p not in taken]} for group in groups]
    taken.update(parameter for group in left for parameter in group["params"])
    return [group for group in left if group["params"]]
