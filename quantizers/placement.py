"""Which tensors and weights of a graph are quantized under a protocol, at which width, signed or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import fx, nn

from quantizers.layer import WEIGHTED
from quantizers.operators import Operators
from quantizers.protocol import FLOAT, Protocol, check_width


class BitWidths(NamedTuple("BitWidths", [("weight", int), ("activation", int)])):
    """Bits of weights and activations: 2 to 16 each, or 32 for float."""

    __slots__ = ()

    def __new__(cls, weight: int, activation: int) -> BitWidths:
        return super().__new__(cls, check_width("bits.weight", weight), check_width("bits.activation", activation))


class TensorPlan(NamedTuple):
    """One tensor to quantize, named by the node that produces it."""

    node: fx.Node
    bits: int
    signed: bool


class LayerPlan(NamedTuple):
    """One layer to quantize. `inside`: path of the opaque module it stands in, else None; there `input_bits` (None for
    a float input) is the width of the input, which has no node.
    """

    path: str
    layer: nn.Module
    bits: int
    inside: str | None
    input_bits: int | None


class Plan(NamedTuple):
    """All that is to be quantized; widths of 32 are left out."""

    tensors: list[TensorPlan]
    layers: list[LayerPlan]


def weighted_layers(
    graph_module: fx.GraphModule, opaque: Iterable[str] = ()
) -> list[tuple[str, nn.Module, str | None]]:
    """(path, layer, path of the opaque module around it or None) in order of execution, each layer once."""
    operators, found = Operators(graph_module, opaque), {}
    for node in graph_module.graph.nodes:
        for path, layer, inside in _layers_of(operators, node):
            found.setdefault(id(layer), (path, layer, inside))
    return list(found.values())


def _layers_of(operators: Operators, node: fx.Node) -> list[tuple[str, nn.Module, str | None]]:
    module, path = operators.module(node), str(node.target)
    if module is None:
        return []
    if operators.is_weighted(node):
        return [(path, module, None)]
    return [(f"{path}.{name}", m, path) for name, m in module.named_modules() if name and isinstance(m, WEIGHTED)]


def plan(
    graph_module: fx.GraphModule,
    protocol: Protocol,
    bits: BitWidths,
    allocation: Mapping[str, tuple[int, int]] | None = None,
    opaque: Iterable[str] = (),
) -> Plan:
    """Decides what is quantized in a folded graph. `allocation`: layer path -> (weight bits, bits of its input).

    The protocol's widths for the ends of the network come before the allocation. A tensor that several layers read gets
    the largest of their widths; one that no layer reads, that of the layers it reaches through sums and concatenations.
    Layers inside opaque modules quantize their inputs whatever the placement.
    """
    planner = _Planner(graph_module, protocol, bits, dict(allocation or {}), opaque)
    tensors = [] if bits.activation == FLOAT else planner.tensors()
    return Plan([t for t in tensors if t.bits != FLOAT], [p for p in planner.layers() if p is not None])


class _Planner:
    def __init__(
        self,
        graph_module: fx.GraphModule,
        protocol: Protocol,
        bits: BitWidths,
        allocation: dict[str, tuple[int, int]],
        opaque: Iterable[str],
    ) -> None:
        self.operators = Operators(graph_module, opaque)
        self.nodes = list(graph_module.graph.nodes)
        self.protocol, self.bits = protocol, bits
        self.found = weighted_layers(graph_module, opaque)
        self.allocation = _checked(allocation, [path for path, _, _ in self.found])
        self.path_of = {id(layer): path for path, layer, _ in self.found}
        self._find_ends()

    def _find_ends(self) -> None:
        """First layers have no weights before them, last layers none behind them."""
        self.heavy = {n for n in self.nodes if self.operators.is_heavy(n)}
        self.before: dict[fx.Node, set[fx.Node]] = {}  # the nearest nodes with weights that a node depends on
        has_reader: set[fx.Node] = set()
        for node in self.nodes:
            sources = node.all_input_nodes
            self.before[node] = set().union(*({s} if s in self.heavy else self.before[s] for s in sources))
            if node in self.heavy:
                has_reader |= self.before[node]
        self.first = {n for n in self.heavy if not self.before[n]}
        self.last = self.heavy - has_reader
        self.first_layers = {paths[0] for n in self.first if (paths := self._paths(n))}
        self.last_layers = {paths[-1] for n in self.last if (paths := self._paths(n))}

    def _paths(self, node: fx.Node) -> list[str]:
        return [self.path_of[id(layer)] for _, layer, _ in _layers_of(self.operators, node)]

    def layers(self) -> list[LayerPlan | None]:
        return [self._layer(*entry) for entry in self.found]

    def _layer(self, path: str, layer: nn.Module, inside: str | None) -> LayerPlan | None:
        given = self.allocation.get(path, self.bits)
        bits = given[0]
        if path in self.first_layers and self.protocol.first_weight is not None:
            bits = self.protocol.first_weight
        elif path in self.last_layers and self.protocol.last_weight is not None:
            bits = self.protocol.last_weight
        if self.bits.weight == FLOAT:
            bits = FLOAT
        input_bits = given[1]
        if path in self.first_layers:
            input_bits = FLOAT if self.protocol.image is None else self.protocol.image
        elif path in self.last_layers and self.protocol.last_input is not None:
            input_bits = self.protocol.last_input
        if inside is None or FLOAT in (input_bits, self.bits.activation):
            input_bits = None
        return None if bits == FLOAT and input_bits is None else LayerPlan(path, layer, bits, inside, input_bits)

    def tensors(self) -> list[TensorPlan]:
        readers = self._readers()
        if self.protocol.placement == "relu":
            chosen = [n for n in self.nodes if self.operators.is_activation(n)]
        else:
            chosen = self._operands() if self.protocol.placement == "operands" else readers
        placed = {n for n in chosen if n.op != "get_attr" and n.meta["is_tensor"]}
        plans = [self._tensor(node, readers.get(node, [])) for node in self.nodes if node in placed]
        return [p for p in plans if p is not None]

    def _operands(self) -> set[fx.Node]:
        """All that operators read and that depends on the image, where it is computed."""
        varying: set[fx.Node] = set()
        for node in self.nodes:
            if node.op == "placeholder" or varying & set(node.all_input_nodes):
                varying.add(node)
        read = {source for n in self.nodes if self.operators.computes(n) for source in n.all_input_nodes}
        return {self.operators.source(node) for node in read} & varying

    def _readers(self) -> dict[fx.Node, list[fx.Node]]:
        """Tensor -> the layers that read it, seen from where the placement quantizes it."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if self.operators.is_weighted(node):
                for source in self._seen(node.all_input_nodes[0]):
                    readers.setdefault(source, []).append(node)
        return readers

    def _reached(self, node: fx.Node) -> list[fx.Node]:
        """The layers that a tensor reaches, through sums and concatenations, where none reads it as it is."""
        found: dict[fx.Node, None] = {}
        seen, left = {node}, [node]
        while left:
            for user in left.pop().users:
                if self.operators.is_weighted(user):
                    found[user] = None
                elif user not in seen and user not in self.heavy and not self._is_placed(user):
                    seen.add(user)
                    left.append(user)
        return list(found)

    def _is_placed(self, node: fx.Node) -> bool:
        return self.protocol.placement == "relu" and self.operators.is_activation(node)

    def _seen(self, node: fx.Node) -> list[fx.Node]:
        """Where the placement quantizes what a layer reads: with "operands" on both sides of a mean."""
        placement, producer = self.protocol.placement, self.operators.producer(node)
        if placement != "operands":
            return [node if placement == "layer_input" else producer]
        found = [self.operators.source(node)]
        while found[-1] is not producer and found[-1].all_input_nodes:
            found.append(self.operators.source(found[-1].all_input_nodes[0]))
        return found

    def _tensor(self, node: fx.Node, readers: list[fx.Node]) -> TensorPlan | None:
        protocol = self.protocol
        layers = [path for reader in readers or self._reached(node) for path in self._paths(reader)]
        given = [self.allocation[path][1] for path in layers if path in self.allocation]
        bits = max(given) if given else self.bits.activation
        if not readers and protocol.placement == "operands" and protocol.operand is not None:
            bits = protocol.operand
        behind = {node} if node in self.heavy else self.before[node]
        if not behind:  # the image, or what is made of it without weights
            if protocol.image is None:
                return None
            bits = protocol.image
        elif behind and behind <= self.first and protocol.first_output is not None:
            bits = protocol.first_output
        elif set(readers) & self.last and protocol.last_input is not None:
            bits = protocol.last_input
        return TensorPlan(node, bits, signed=not self.operators.non_negative(node))


def _checked(allocation: dict[str, tuple[int, int]], layers: list[str]) -> dict[str, tuple[int, int]]:
    for path, (weight, activation) in allocation.items():
        if path not in layers:
            raise ValueError(
                f"allocation: expected paths of layers of the network ({', '.join(layers[:3])}, ...), got {path!r}. "
                "Use the names of the folded graph, see weighted_layers()."
            )
        check_width(f"allocation[{path!r}] weight", weight)
        check_width(f"allocation[{path!r}] activation", activation)
    return allocation
