"""GZSQ's recursion along the traced graph: mean and variance of a convolution from those of the layer that feeds it.

Sharma, Abraham, Rajendiran, "A Generalized Zero-Shot Quantization of Deep Convolutional Neural Networks via Learned
Weights Statistics" (GZSQ), IEEE TMM 2021, arXiv 2112.02834, who number layers one after the other. Chosen here, for
networks that are no chain: activations, poolings and normalisations pass on what enters them; a concatenation holds the
channels of all its inputs, and whatever rearranges channels rearranges them; where tensors are added or multiplied, the
trunk goes on: of those that are as large as the result and no gate, the one that has passed most layers. Inside a part
that cannot be traced layers follow each other in order of execution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.layer import WEIGHTED, output_first
from quantizers.normalize import constant as parameter
from quantizers.operators import Operators
from quantizers.trace import ROOT, trace
from synthesis.moments import Moments
from synthesis.operator_call import Call, constant, exact, holds_moments
from synthesis.operator_moments import RULES
from synthesis.statistics import device_of, execution_order

Carry = Callable[[Tensor, int, str], Tensor]
_GATES = ("sigmoid", "hardsigmoid", "softmax")
_REARRANGING = (
    "cat concat stack getitem chunk split tensorsplit unbind narrow select flip roll flatten unflatten view reshape "
    "permute transpose movedim squeeze unsqueeze expand channelshuffle channelgather size dim getattr numel"
)
_RULES = {name: RULES[name] for name in _REARRANGING.split() if name in RULES} | {"mean": RULES["view"]}


@torch.no_grad()
def sum_gaussians(network: nn.Module, input_size: tuple[int, int, int], carry: Carry) -> dict[str, Moments]:
    """Return the moments (C,) that GZSQ assigns to every convolution's output, by module path in order of execution.

    Args:
        network: without BatchNorm; evaluated in its evaluation mode, on a copy.
        input_size: (C, H, W) of N(0, 1) images.
        carry: (values (C,), C', layer) -> values (C',), called for means and for deviations where a layer has another
            number of output than of input channels.
    """
    order = execution_order(network, input_size, "conv_output")
    found = _Walk(network, input_size, list(order), carry).run()
    device = device_of(network)
    return {name: Moments(*(t.to(device, torch.float32) for t in found[name])) for name in order}


class _Walk:
    """One pass over the nodes of a graph; moments are held as `Call` wants them."""

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int], order: list[str], carry: Carry) -> None:
        self.network = network
        self.order = order
        self.carry = carry
        traced = trace(network, torch.zeros(1, *input_size))
        self.graph_module, self.opaque = traced.graph_module, traced.opaque
        self.operators = Operators(self.graph_module, self.opaque)
        self.values: dict[fx.Node, Any] = {}
        self.depth: dict[fx.Node, int] = {}  # layers passed since the image; -1 for what does not come from it
        self.found: dict[str, Moments] = {}

    def run(self) -> dict[str, Moments]:
        """Return the moments (C,) of every convolution by path."""
        for node in self.graph_module.graph.nodes:
            if node.op == "output" or all(name in self.found for name in self.order):
                break
            self.depth[node] = max((self.depth[n] for n in node.all_input_nodes), default=-1)
            if node.op == "placeholder":
                self.depth[node] = 0
                one = torch.ones((1,) * len(node.meta["shape"]), dtype=torch.float64)
                self.values[node] = Moments(0 * one, one)
            elif node.op == "get_attr":
                self.values[node] = constant(parameter(self.graph_module, node))
            else:
                self.values[node] = self._evaluate(Call(node, self.operators, self.values))
        return self.found

    def _evaluate(self, call: Call) -> Any:
        if not any(holds_moments(self.values[node]) for node in call.node.all_input_nodes):
            args, kwargs = call.arguments()
            return constant(call.run(*args, **kwargs))
        layers = self._layers(call)
        if not layers and call.name in _RULES:
            return _RULES[call.name](call)
        trunk, shape = self._trunk(call), call.node.meta["shape"]
        if shape is None:
            raise call.unknown()  # a pooling that returns its indices too
        if not layers:
            return self._fitted(self.values[trunk], shape, call.node.name)
        self.depth[call.node] += len(layers)
        axis = -1 if isinstance(call.module, nn.Linear) else 1
        mean, var = (_vector(t, trunk.meta["shape"], axis) for t in self.values[trunk])
        for name, layer in layers.items():
            mean, var = self._pass(mean, var, name, layer)
            self.found.setdefault(name, Moments(mean, var))
        return self._fitted(Moments(*(_along(t, len(shape), axis) for t in (mean, var))), shape, call.node.name)

    def _layers(self, call: Call) -> dict[str, nn.Module]:
        """The layers that a node runs: itself, or those inside it."""
        if call.node.target in self.opaque:
            path = "" if call.node.target == ROOT and list(self.opaque) == [ROOT] else f"{call.node.target}."
            return {name: self.network.get_submodule(name) for name in self.order if name.startswith(path)}
        return {call.node.meta["scope"]: call.module} if isinstance(call.module, WEIGHTED) else {}

    def _trunk(self, call: Call) -> fx.Node:
        """The input whose moments go on."""
        nodes = [node for node in call.node.all_input_nodes if isinstance(self.values[node], Moments)]
        if not nodes:
            raise call.unknown()
        nodes = [node for node in nodes if node.meta["shape"] == call.node.meta["shape"]] or nodes
        if call.name == "mul":
            nodes = [n for n in nodes if self.operators.name(self.operators.producer(n)) not in _GATES] or nodes
        return max(nodes, key=self.depth.__getitem__)

    def _pass(self, mean: Tensor, var: Tensor, name: str, layer: Any) -> tuple[Tensor, Tensor]:
        """mu = mu_W + b + mu before, s^2 = s_W^2 + s^2 before."""
        rows = exact(output_first(layer)).flatten(1)
        if len(rows) != len(mean):
            mean, var = self.carry(mean, len(rows), name), self.carry(var.sqrt(), len(rows), name).square()
        bias = 0.0 if layer.bias is None else exact(layer.bias)
        return rows.mean(1) + bias + mean, rows.var(1, correction=0) + var

    def _fitted(self, value: Moments, shape: tuple[int, ...], name: str) -> Moments:
        """The value where its channels are those of `shape`, else one number for all of them."""
        sizes = value.mean.shape
        if len(sizes) == len(shape) and all(a in (1, b) for a, b in zip(sizes, shape, strict=True)):
            return value
        mean, std = (self.carry(t.flatten(), 1, name) for t in (value.mean, value.var.sqrt()))
        return Moments(*(t.view((1,) * len(shape)) for t in (mean, std.square())))


def _vector(t: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """(1, C, 1, ...) -> (C,), also where a size of 1 stands for equal values."""
    return t.transpose(axis, -1).flatten(0, -2).mean(0).expand(shape[axis])


def _along(vector: Tensor, dims: int, axis: int) -> Tensor:
    return vector.view((1,) * (dims - 1) + (-1,)).transpose(axis, -1)
