"""The layers that corrections change, and how an output channel of one is scaled and shifted."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.layer import WEIGHTED, QuantizedLayer, output_first, own_layout
from quantizers.trace import Trace

log = logging.getLogger(__name__)
NUDGE = 1e-6  # relative; some units of the last place, far less than a step


def float_layer(module: nn.Module) -> Any:
    """The convolution or linear layer inside a quantized layer, or the layer itself."""
    return module.layer if isinstance(module, QuantizedLayer) else module


def own_layers(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """Layers with weights that have a node of their own and run once, by path, in order of execution."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, QuantizedLayer) or type(module) in WEIGHTED:
                found.setdefault(str(node.target), []).append(node)
    shared = _at_several_paths(graph_module)
    return {path: nodes[0] for path, nodes in found.items() if len(nodes) == 1 and path not in shared}


def _at_several_paths(graph_module: fx.GraphModule) -> set[str]:
    paths: dict[int, list[str]] = {}
    for path, module in graph_module.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    return {path for same in paths.values() if len(same) > 1 for path in same}


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """Outputs of a layer as (C, observations)."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return x.movedim(axis, 0).flatten(1)


@torch.no_grad()
def add_missing_biases(traced: Trace) -> None:
    """Give every layer a bias of zeros that has none, so that student files have the same tensors whatever is corrected
    later.
    """
    for module in traced.graph_module.modules():
        if isinstance(module, WEIGHTED) and module.bias is None:
            bias_of(module)


@torch.no_grad()
def shift_outputs(module: nn.Module, shift: Tensor) -> None:
    """Add `shift` (C,) to the bias."""
    bias = bias_of(float_layer(module))
    bias.copy_(bias.double() + shift.to(bias.device, torch.float64))


@torch.no_grad()
def scale_outputs(module: nn.Module, gain: Tensor) -> None:
    """Multiply output channels by `gain` (C,), positive: weight, bias and weight scales; the integers stay as they are.

    Raises:
        ValueError: if the weight has one scale for all channels.
    """
    scale_weights(module, gain)
    bias = bias_of(float_layer(module))
    bias.copy_(bias.double() * gain.to(bias.device, torch.float64))


@torch.no_grad()
def scale_weights(module: nn.Module, gain: Tensor) -> None:
    """`scale_outputs` without the bias."""
    layer = float_layer(module)
    gain = gain.to(layer.weight.device, torch.float64)
    weight = output_first(layer).double()
    scaled = (weight * gain.view(-1, *(1,) * (weight.dim() - 1))).to(layer.weight.dtype)
    if isinstance(module, QuantizedLayer):
        before = module.weight_quantizer.integers(output_first(layer))[0]
        module.weight_quantizer.rescale(gain.to(layer.weight.dtype))
        scaled = _with_integers(module, scaled, before)
    layer.weight.copy_(own_layout(layer, scaled))


def _with_integers(module: QuantizedLayer, weight: Tensor, wanted: Tensor) -> Tensor:
    """`weight`, but where a product rounded across a threshold moved back by a few units of the last place."""
    for _ in range(4):
        off = module.weight_quantizer.integers(weight)[0] - wanted
        if not bool(off.any()):
            return weight
        weight = weight - off.sign() * weight.abs() * NUDGE
    if moved := int((module.weight_quantizer.integers(weight)[0] != wanted).sum()):
        shape = "x".join(map(str, weight.shape))
        log.warning("%d weights of a layer (%s) went to a neighbouring level when its scales changed", moved, shape)
    return weight


def bias_of(layer: Any) -> Tensor:
    """The bias of a layer, zeros where it had none."""
    if layer.bias is None:
        outputs = getattr(layer, "out_channels", None) or layer.out_features
        layer.bias = nn.Parameter(torch.zeros(outputs).to(layer.weight), requires_grad=False)
    return layer.bias
