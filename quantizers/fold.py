"""Batch normalisation at inference is an affine map per channel; where it follows a layer directly, it joins the layer.

For y = gamma * (W x + b - mu) / sqrt(var + eps) + beta the layer becomes W' = s W, b' = s (b - mu) + beta with
s = gamma / sqrt(var + eps) per output channel. Elsewhere (before a convolution, behind an addition) it stays, as an
affine map that training mode cannot change.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quantizers.layer import WEIGHTED, output_first, own_layout
from quantizers.normalize import constant
from quantizers.trace import StoredNorm, Trace, trace

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class FrozenNorm(nn.Module):
    """x * scale + shift per channel: a batch normalisation that nothing precedes with which it could be folded."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale, requires_grad=False)  # (C,)
        self.shift = nn.Parameter(shift, requires_grad=False)  # (C,)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


class _Affine(NamedTuple):
    scale: Tensor  # (C,)
    shift: Tensor  # (C,)
    stored: StoredNorm


@torch.no_grad()
def fold(model: nn.Module, example: Tensor) -> Trace:
    """Traces `model` and folds its batch normalisations; every node that remains keeps its name. Float throughout."""
    traced = trace(model, example)
    graph_module, graph = traced.graph_module, traced.graph_module.graph
    calls = Counter(id(graph_module.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module")
    affines = {node: affine for node in graph.nodes if (affine := _affine(graph_module, node)) is not None}
    norms: dict[str, StoredNorm] = {}
    for norm, (scale, shift, stored) in affines.items():
        source = norm.args[0] if norm.args else norm.kwargs["input"]
        if _can_join(graph_module, source, traced.opaque, calls):
            _join(graph_module.get_submodule(str(source.target)), scale, shift)
            norms[str(source.target)] = stored
            norm.replace_all_uses_with(source)
            graph.erase_node(norm)
        elif norm.op == "call_module" and calls[id(graph_module.get_submodule(str(norm.target)))] == 1:
            graph_module.add_submodule(str(norm.target), FrozenNorm(scale, shift))
            norms[str(norm.target)] = stored
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return traced._replace(norms=norms)


def _affine(graph_module: fx.GraphModule, node: fx.Node) -> _Affine | None:
    """Scale and shift of a batch normalisation with fixed statistics; None for any other node."""
    values: list[Any]
    if node.op == "call_module":
        norm: Any = graph_module.get_submodule(str(node.target))
        if type(norm) not in _NORMS or norm.running_mean is None:
            return None
        values, eps = [norm.running_mean, norm.running_var, norm.weight, norm.bias], norm.eps
    elif node.op == "call_function" and node.target is F.batch_norm:
        names = ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"]
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if given.get("training", False) is not False or given.get("running_mean") is None:
            return None
        values = [constant(graph_module, v) if isinstance(v := given.get(k), fx.Node) else v for k in names[1:5]]
        eps = given.get("eps", 1e-5)
    else:
        return None
    mean, var, weight, bias = values
    scale = (var.double() + eps).rsqrt() * (1.0 if weight is None else weight.double())
    beta = torch.zeros_like(scale) if bias is None else bias.double()
    stored = StoredNorm(beta.to(mean.dtype), (scale.abs() * var.double().sqrt()).to(mean.dtype))
    return _Affine(scale.to(mean.dtype), (beta - mean.double() * scale).to(mean.dtype), stored)


def _can_join(graph_module: fx.GraphModule, source: Any, opaque: dict[str, str], calls: Counter[int]) -> bool:
    """A layer takes in a normalisation if nobody else reads its output and it runs once."""
    if not isinstance(source, fx.Node) or source.op != "call_module" or source.target in opaque:
        return False
    layer = graph_module.get_submodule(str(source.target))
    if not isinstance(layer, WEIGHTED) or len(source.users) != 1 or calls[id(layer)] != 1:
        return False
    # a linear layer has its channels last, the normalisation its channels second: alike for (N, C) only
    return not isinstance(layer, nn.Linear) or len(source.meta["shape"] or ()) == 2


def _join(layer: Any, scale: Tensor, shift: Tensor) -> None:
    weight = output_first(layer).double()
    bias = torch.zeros_like(shift) if layer.bias is None else layer.bias
    folded = weight * scale.double().view(-1, *(1,) * (weight.ndim - 1))
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(own_layout(layer, folded).to(dtype), requires_grad=False)
    layer.bias = nn.Parameter((bias.double() * scale.double() + shift.double()).to(dtype), requires_grad=False)
