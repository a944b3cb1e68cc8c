"""Consecutive layers between whose channels a positive factor can be moved, found in the traced graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from corrections.layers import own_layers
from quantizers.layer import output_first
from quantizers.operators import Operators
from quantizers.trace import Trace

# f(s x) = s f(x) for s > 0, channel by channel
HOMOGENEOUS = frozenset({"relu", "leakyrelu", "prelu", "identity", "dropout"})
POOLINGS = frozenset(f"{kind}{n}d" for kind in ("maxpool", "avgpool", "adaptiveavgpool") for n in (1, 2, 3))
FLATTENING = frozenset({"flatten", "view", "reshape", "squeeze"})


class Pair(NamedTuple):
    """Output channel i of `first` is, but for `between`, input channel i of `second`; nobody else reads it.

    `between`: the nodes from the first layer's output to the second's input; `bounded`: those of them that are
    homogeneous once their upper bound is taken away (ReLU6).
    """

    first: fx.Node
    second: fx.Node
    between: tuple[fx.Node, ...]
    bounded: tuple[fx.Node, ...]


def find_pairs(traced: Trace, *, through_relu6: bool = False) -> list[Pair]:
    """Pairs of layers in order of execution; with `through_relu6` also those that a ReLU6 stands between."""
    graph_module = traced.graph_module
    operators = Operators(graph_module, traced.opaque)
    layers = {n: graph_module.get_submodule(p) for p, n in own_layers(graph_module).items() if p not in traced.opaque}
    found = [_follow(node, layers, operators, through_relu6) for node in layers]
    return [pair for pair in found if pair is not None]


def _follow(first: fx.Node, layers: dict[fx.Node, Any], operators: Operators, through_relu6: bool) -> Pair | None:
    node, between, bounded = first, list[fx.Node](), list[fx.Node]()
    features = isinstance(layers[first], nn.Linear)  # channels last
    while len(node.users) == 1:
        (user,) = node.users
        if user in layers:
            return Pair(first, user, tuple(between), tuple(bounded)) if _fits(node, layers, first, user) else None
        if not user.meta.get("is_tensor") or user.args[:1] != (node,) or len(user.all_input_nodes) > 1:
            return None
        if _is_relu6(user, operators):
            if not through_relu6:
                return None
            bounded.append(user)
        elif not _passes(user, node, operators, features):
            return None
        between.append(user)
        node = user
    return None


def _passes(user: fx.Node, node: fx.Node, operators: Operators, features: bool) -> bool:
    """Whether channel i of the result is a homogeneous function of channel i of `node`."""
    name = operators.name(user)
    if user.target in operators.opaque:
        return False
    if name in HOMOGENEOUS:
        return True
    before, after = node.meta["shape"], user.meta["shape"]
    if features or before is None or after is None:
        return False
    if name in POOLINGS:
        return len(before) == len(after)
    single = all(size == 1 for size in (*before[2:], *after[2:]))  # one position: only the axes of size 1 go
    return bool(name in FLATTENING and len(after) >= 2 and before[:2] == after[:2] and single)


def _fits(read: fx.Node, layers: dict[fx.Node, Any], first: fx.Node, second: fx.Node) -> bool:
    """Whether both layers have their channels on the same axis of the tensor between them."""
    source, reader, shape = layers[first], layers[second], read.meta["shape"]
    if shape is None or second.all_input_nodes != [read]:
        return False
    axis = len(shape) - 1 if isinstance(source, nn.Linear) else 1
    wanted = len(shape) - 1 if isinstance(reader, nn.Linear) else 1
    return bool(axis == wanted and {len(output_first(source)), input_channels(reader)} == {shape[axis]})


def _is_relu6(node: fx.Node, operators: Operators) -> bool:
    """ReLU6 by any name: nn.ReLU6, F.relu6, nn.Hardtanh(0, 6), torch.clamp(x, 0, 6)."""
    name, module = operators.name(node), operators.module(node)
    if node.target in operators.opaque:
        return False
    if name == "relu6":
        return True
    if name == "hardtanh" and module is not None:
        return float(module.min_val) == 0.0  # type: ignore[arg-type]
    bounds = [*node.args[1:], *node.kwargs.values()]
    closed = len(bounds) == 2 and bounds[0] == 0 and bounds[1] is not None
    return bool(name in ("hardtanh", "clamp", "clip") and closed)


def to_relu(node: fx.Node) -> None:
    """Replaces an activation function by ReLU; the node keeps its name."""
    node.op, node.target, node.args, node.kwargs = "call_function", torch.relu, (node.all_input_nodes[0],), {}


def input_channels(layer: Any) -> int:
    """Input channels of a convolution or linear layer, all groups together."""
    return output_first(layer).shape[1] * getattr(layer, "groups", 1)


def by_input(layer: Any, weight: Tensor) -> Tensor:
    """A weight with output channels first as (groups, outputs per group, inputs per group, kernel positions)."""
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
