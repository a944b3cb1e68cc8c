"""Cuts a network's graph into units that are reconstructed one after the other.

Block reconstruction: Li et al., "BRECQ", ICLR 2021, arXiv 2102.05426. Blocks are found in the graph instead of in a
table of classes: a cut is possible where a single tensor is alive, and the pieces between cuts are merged to the
modules that the network's author repeated (see `naming`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import fx, nn

from quantizers.layer import WEIGHTED
from reconstruction.merging import merge
from reconstruction.naming import Scopes

Granularity = Literal["layer", "block", "merged", "stage", "network"]
_NAMES = (
    """relu relu6 leaky_relu prelu elu selu celu silu gelu mish softplus sigmoid tanh hardswish hardsigmoid hardtanh"""
)
ACTIVATION_FUNCTIONS = frozenset(
    getattr(owner, name) for owner in (F, torch) for name in _NAMES.split() if hasattr(owner, name)
)
ACTIVATION_METHODS = frozenset({"relu", "sigmoid", "tanh", "clamp", "clamp_min"})


@dataclass(frozen=True)
class Unit:
    """A part of the graph, with the names of its nodes in the order of execution.

    Attributes:
        name: unique; the path of the block or layer.
        nodes: all nodes of the reference graph that belong here.
        inputs: nodes of earlier units that are read here (for the first unit: the network's input).
        outputs: own nodes that later units, or the caller of the network, read.
        layers: module paths of the layers with weights, each once.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[str, ...]


def partition(reference: fx.GraphModule, granularity: Granularity, *, merges: float = 0.25) -> list[Unit]:
    """Cut `reference` into a chain of units that together hold every node once.

    Constants (attributes, and what is computed from them alone) belong to no unit: each unit that reads one makes it.

    Args:
        reference: a traced network with one input; `node.meta["is_tensor"]` says where a value is no tensor.
        granularity: "layer": each layer with the activation function behind it; "block": the network's repeated blocks;
            "merged": blocks, some of them joined with their neighbours (see `merging`); "stage": the containers that
            hold the blocks; "network": one unit.
        merges: for "merged", how many pairs of neighbours are joined; below 1 a share of all pairs.

    Raises:
        ValueError: if `granularity` is none of these, `merges` is no number of pairs, or the graph has not exactly one
            input.
    """
    if granularity not in get_args(Granularity):
        raise ValueError(f"granularity: expected one of {get_args(Granularity)}, got {granularity!r}")
    inputs = [node.name for node in reference.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"reference: expected a network with one input, got {inputs}; wrap it so that it takes one")
    order = body(reference)
    if granularity == "network":
        return _named(reference, [("network", order)])
    if granularity == "layer":
        return _named(reference, _layers(reference, order))
    pieces = _blocks(
        reference, _atoms(order, single=True), Scopes(reference.graph.nodes), stages=granularity == "stage"
    )
    if granularity == "merged":
        pieces = merge(pieces, [_capacity(reference, nodes) for _, nodes in pieces], merges)
    return _named(reference, pieces)


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Attributes and everything computed from them alone: the same for every batch, so never passed between units."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def body(graph_module: fx.GraphModule) -> list[fx.Node]:
    """All nodes but the constants, in the order of execution."""
    fixed = constants(graph_module.graph)
    return [node for node in graph_module.graph.nodes if node not in fixed]


def is_weighted(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node runs a layer with weights, or an opaque module that contains one."""
    if node.op != "call_module":
        return False
    return any(isinstance(m, WEIGHTED) for m in graph_module.get_submodule(str(node.target)).modules())


def is_activation(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is an elementwise activation function (ReLU, GELU, ...)."""
    if node.op == "call_module":
        kind = type(graph_module.get_submodule(str(node.target)))
        known = kind.__module__ == nn.ReLU.__module__
        return known and kind not in (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
    if node.op == "call_method":
        return node.target in ACTIVATION_METHODS
    return node.op == "call_function" and node.target in ACTIVATION_FUNCTIONS


def _capacity(reference: fx.GraphModule, nodes: Iterable[fx.Node]) -> int:
    """How many weights the layers have, each once."""
    targets = {str(node.target) for node in nodes if is_weighted(reference, node)}
    parameters = {p for target in targets for p in reference.get_submodule(target).parameters() if p.dim() > 1}
    return sum(parameter.numel() for parameter in parameters)


def _atoms(order: Sequence[fx.Node], *, single: bool) -> list[list[fx.Node]]:
    """The pieces between possible cuts: where all values alive are tensors and, with `single`, there is just one."""
    position = {node: i for i, node in enumerate(order)}
    last = {node: max((position[u] for u in node.users if u in position), default=-1) for node in order}
    alive: set[fx.Node] = set()
    atoms: list[list[fx.Node]] = [[]]
    for i, node in enumerate(order):
        atoms[-1].append(node)
        alive = {n for n in (*alive, node) if last[n] > i}
        tensors = all(n.meta.get("is_tensor", True) for n in alive)
        if alive and tensors and (len(alive) == 1 or not single):
            atoms.append([])
    return [atom for atom in atoms if atom]


def _layers(reference: fx.GraphModule, order: Sequence[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """Each layer with the activation function that alone reads it; what lies between them is glue."""
    pieces: list[tuple[str, list[fx.Node]]] = []
    glue = False
    for atom in _atoms(_pull_up_activations(reference, order), single=False):
        weighted = [node for node in atom if is_weighted(reference, node)]
        follows = bool(pieces) and not glue and _belongs_to_layer(reference, atom, pieces[-1][1])
        if weighted:
            pieces.append((str(weighted[0].target), list(atom)))
        elif pieces and (glue or follows):
            pieces[-1][1].extend(atom)
            continue
        else:
            pieces.append((atom[0].name, list(atom)))
        glue = not weighted
    return pieces


def _belongs_to_layer(reference: fx.GraphModule, atom: Sequence[fx.Node], layer: Sequence[fx.Node]) -> bool:
    node = atom[0]
    return len(atom) == 1 and is_activation(reference, node) and list(layer[-1].users) == [node]


def _pull_up_activations(reference: fx.GraphModule, order: Sequence[fx.Node]) -> list[fx.Node]:
    """Run an activation function right after the layer it follows, where other branches were recorded in between."""
    result: list[fx.Node] = []
    for node in order:
        source = node.all_input_nodes[0] if is_activation(reference, node) else node
        if source in result and is_weighted(reference, source) and len(source.users) == 1:
            result.insert(result.index(source) + 1, node)
        else:
            result.append(node)
    return result


def _blocks(
    reference: fx.GraphModule, atoms: Iterable[list[fx.Node]], scopes: Scopes, *, stages: bool
) -> list[tuple[str, list[fx.Node]]]:
    """Atoms merged where they follow each other in the same block (or stage); the rest is glue with its own name."""
    merged: list[tuple[str, list[fx.Node]]] = []
    for atom in atoms:
        weighted = [node for node in atom if is_weighted(reference, node)]
        key = scopes.key(weighted or atom, stage=stages)
        if merged and merged[-1][0] == key:
            merged[-1][1].extend(atom)
        else:
            merged.append((key, list(atom)))
    pieces: list[tuple[str, list[fx.Node]]] = []
    glue = False
    for key, nodes in merged:
        weighted = any(is_weighted(reference, node) for node in nodes)
        activation = len(nodes) == 1 and is_activation(reference, nodes[0])
        if not weighted and pieces and (glue or activation):
            pieces[-1][1].extend(nodes)
            continue
        pieces.append((key if weighted else nodes[0].name, nodes))
        glue = not weighted
    return pieces


def _named(reference: fx.GraphModule, pieces: list[tuple[str, list[fx.Node]]]) -> list[Unit]:
    """Units from pieces: the network's input joins the first piece with other nodes, its output the last one."""
    ends = {"placeholder": 1, "output": -2}
    for op, neighbour in ends.items():
        place = 0 if op == "placeholder" else -1
        if len(pieces) > 1 and all(node.op == op for node in pieces[place][1]):
            lone, other = pieces[place][1], pieces[neighbour][1]
            other[:] = lone + other if op == "placeholder" else other + lone
            del pieces[place]
    fixed = constants(reference.graph)
    counts: dict[str, int] = {}
    units = []
    for key, nodes in pieces:
        counts[key] = counts.get(key, 0) + 1
        units.append(_unit(reference, key if counts[key] == 1 else f"{key}#{counts[key]}", nodes, fixed))
    return units


def _unit(reference: fx.GraphModule, name: str, nodes: list[fx.Node], fixed: set[fx.Node]) -> Unit:
    own = set(nodes)
    read = itertools.chain.from_iterable(node.all_input_nodes for node in nodes)
    inputs = dict.fromkeys(n.name for n in read if n not in own and n not in fixed)
    inputs |= {n.name: None for n in nodes if n.op == "placeholder"}
    outputs = [n.name for n in nodes if any(u not in own or u.op == "output" for u in n.users if u not in fixed)]
    layers = dict.fromkeys(str(n.target) for n in nodes if is_weighted(reference, n))
    return Unit(name, tuple(n.name for n in nodes), tuple(inputs), tuple(outputs), tuple(layers))
