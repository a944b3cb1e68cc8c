"""Mean and variance of every tensor of a network, from its weights and the colours of its input alone.

Carries on Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ), ICCV 2019,
arXiv 1906.04721, who take E[ReLU(N(beta, gamma^2))] behind one BatchNorm. Deviates: through the whole network, with
variances.

Assumed, before each operator anew: channels and positions are independent normals. Hence nothing is known of how
neighbouring pixels, a residual branch and its shortcut, or a gate and what it gates go together; of the maps that a
pooling averages, in particular, too little variance is left. Borders are ignored: a convolution or pooling with padding
counts as if every position were in the interior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantizers.channel_gather import ChannelGather
from quantizers.fold import FrozenNorm
from quantizers.normalize import constant as parameter
from quantizers.operators import Operators
from quantizers.trace import StoredNorm, trace
from synthesis.moments import Moments, merge
from synthesis.operator_call import Call, along_channels, constant, exact, holds_moments
from synthesis.operator_moments import BATCH_NORMS, RULES, stored_output
from synthesis.statistics import device_of, layers_at


@torch.no_grad()
def propagate(network: nn.Module, input_size: tuple[int, int, int], prior: Moments) -> dict[str, Moments]:
    """Return the moments (C,) of every convolution's output, bias included, by module path in order of execution.

    Args:
        network: with BatchNorm (which stays where it is) or without; evaluated in its evaluation mode, on a copy.
        input_size: (C, H, W).
        prior: of the input, () or one a channel (C,).

    Raises:
        ValueError: if there is no convolution, or an operator before the last one is not known.
    """
    graph_module = trace(network, torch.zeros(1, *input_size)).graph_module
    paths = convolutions(graph_module, network)
    moments = propagate_graph(graph_module, prior, last=next(reversed(paths)))
    found: dict[str, Moments] = {}
    counts: dict[str, int] = {}
    for node, path in paths.items():
        seen, count = moments[node], math.prod(node.meta["shape"][2:])
        if path in found:  # a layer that runs twice: pooled, as whoever reads its output pools
            seen, count = merge([found[path], seen], [counts[path], count]), counts[path] + count
        found[path], counts[path] = seen, count
    device = device_of(network)
    return {path: Moments(*(t.to(device, torch.float32) for t in seen)) for path, seen in found.items()}


def convolutions(graph_module: fx.GraphModule, network: nn.Module) -> dict[fx.Node, str]:
    """Return the nodes that are convolutions, in order of execution, with their module path in `network`.

    Raises:
        ValueError: if there are none, or the graph does not show them.
    """
    names = layers_at(network, "conv_output")
    found = {
        node: node.meta["scope"]  # not the target: a class of its own that computes its weight is traced through
        for node in graph_module.graph.nodes
        if node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), nn.Conv2d)
        if node.meta["scope"] in names
    }
    if not found:
        raise ValueError(
            f"network: expected convolutions in the graph of {type(network).__name__}, got none, because it cannot be "
            "traced; choose a generator whose targets need no graph, such as generator=zeroq or generator=noise"
        )
    return found


@torch.no_grad()
def propagate_graph(
    graph_module: fx.GraphModule,
    prior: Moments,
    *,
    last: fx.Node | None = None,
    stored: bool = False,
    norms: Mapping[str, StoredNorm] | None = None,
    skip_unknown: bool = False,
) -> dict[fx.Node, Moments]:
    """Return the moments of every node that is a tensor, one for each index of axis 1 (the channels).

    Where values differ along another axis too (the groups of a channel shuffle), they are pooled: Var = E[var] +
    Var[mean]. A tensor with fewer than two axes has one pair of moments, of shape (1,). Nodes that give tuples (chunk)
    have none; those that pick from them have.

    Args:
        graph_module: as `quantizers.trace.trace` or `quantizers.fold.fold` makes it: shapes stand in `node.meta`.
        prior: of the input, () or one a channel (C,).
        last: the node to stop at; None goes on to the end.
        stored: whether what enters a BatchNorm has the statistics that it stored, whatever was propagated to it; its
            output then is N(beta, gamma^2), and errors do not add up.
        norms: the same for a BatchNorm that was folded, by the path of the layer that took it in.
        skip_unknown: leave out the nodes behind an operator that is not known, up to the next stored statistics.

    Returns:
        Moments (C,) in float64 on the CPU, in order of execution.

    Raises:
        ValueError: at an operator that is not known, unless these are skipped; says which node.
    """
    operators = Operators(graph_module)
    values: dict[fx.Node, Any] = {}
    norms = norms or {}
    for node in graph_module.graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder":
            values[node] = _input(node, prior, len(values))
        elif node.op == "get_attr":
            values[node] = constant(parameter(graph_module, node))
        else:
            call = Call(node, operators, values)
            if node.op == "call_module" and node.target in norms:
                beta, gamma = (along_channels(exact(t), len(node.meta["shape"])) for t in norms[node.target])
                values[node] = Moments(beta, gamma.square())
            elif stored and call.name in BATCH_NORMS:
                values[node] = stored_output(call)
            elif not skip_unknown:
                values[node] = _evaluate(call)
            elif all(source in values for source in node.all_input_nodes):
                with suppress(ValueError):
                    values[node] = _evaluate(call)
        if node is last:
            break
    tensors = {node: value for node, value in values.items() if isinstance(value, Moments)}
    return {node: _per_channel(value, node.meta["shape"]) for node, value in tensors.items()}


def _evaluate(call: Call) -> Any:
    """Moments, a tuple of them, or what is no feature map (a size)."""
    if not any(holds_moments(call.values[node]) for node in call.node.all_input_nodes):
        args, kwargs = call.arguments()
        return constant(call.run(*args, **kwargs))
    rule = RULES.get(call.name)
    # another class of that name, kept whole because it could not be traced, may compute anything
    foreign = call.module is not None and not type(call.module).__module__.startswith("torch.nn.")
    if rule is None or (foreign and not isinstance(call.module, FrozenNorm | ChannelGather)):
        raise call.unknown()
    value = rule(call)
    if isinstance(value, Moments) and not call.node.meta["is_tensor"]:
        raise call.unknown()  # a pooling that returns its indices too
    return value


def _input(node: fx.Node, prior: Moments, before: int) -> Moments:
    shape, channels = node.meta["shape"], prior.mean.numel()
    if before or shape is None:
        raise ValueError(f"network: expected the images as its only input, got {node.name!r} too; give it a default")
    if channels not in (1, shape[1]) or prior.var.numel() not in (1, shape[1]):
        raise ValueError(
            f"prior: expected one mean and variance, or one for each of {shape[1]} channels, got {channels} means and "
            f"{prior.var.numel()} variances; give as many as the input has channels"
        )
    tensors = (t.detach().to("cpu", torch.float64) for t in prior)
    mean, var = torch.broadcast_tensors(*(t.reshape(1, -1, *(1,) * (len(shape) - 2)) for t in tensors))
    return Moments(mean, var)


def _per_channel(moments: Moments, shape: tuple[int, ...]) -> Moments:
    mean, var = moments
    assert mean.shape == var.shape
    assert torch.broadcast_shapes(mean.shape, shape) == shape

    def rows(t: Tensor) -> Tensor:  # (C, the rest); axes of size 1 stand for equal values
        return t.transpose(0, 1).reshape(t.shape[1], -1) if len(shape) > 1 else t.reshape(1, -1)

    mean, var = rows(mean), rows(var)
    pooled = Moments(mean.mean(1), var.mean(1) + mean.var(1, correction=0))
    return Moments(*(t.expand(shape[1] if len(shape) > 1 else 1).contiguous() for t in pooled))
