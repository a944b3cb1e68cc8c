"""A unit as a network of its own, cut out of the reference or of the student; modules and parameters are shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from reconstruction.partition import Unit, constants


class Interface(NamedTuple):
    """What a unit reads and returns in one graph, by node name.

    Attributes:
        inputs: values of earlier units, in the order of the extracted module's arguments.
        outputs: what it returns, in the order of `unit.outputs`; in the student a quantization site stands for the
            tensor it quantizes.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def tensor_name(node: fx.Node) -> str:
    """The node of the reference whose value `node` carries: its own name, or for a site that of its tensor."""
    return node.meta.get("tensor", node.name)


class Cutter:
    """Cuts units out of one graph, the reference's or the student's.

    Args:
        graph_module: the network; it has to stay as it is.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.constants = constants(graph_module.graph)
        self.position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.position}
        self.by_tensor: dict[str, list[fx.Node]] = {}
        for node in self.position:
            self.by_tensor.setdefault(tensor_name(node), []).append(node)

    def members(self, unit: Unit) -> list[fx.Node]:
        """The nodes that belong to `unit`, in the order of execution; a site goes with its tensor."""
        return sorted((n for name in unit.nodes for n in self.by_tensor[name]), key=self.position.__getitem__)

    def interface(self, unit: Unit) -> Interface:
        """What `unit` reads and returns here."""
        nodes = self.members(unit)
        own = set(nodes)
        inputs: dict[str, None] = {}
        outputs: list[fx.Node] = []
        for node in nodes:
            if node.op != "output":
                read = [node] if node.op == "placeholder" else node.all_input_nodes
                outside = (n for n in read if n.op == "placeholder" or (n not in own and n not in self.constants))
                inputs |= {n.name: None for n in outside}
            if any(user not in own or user.op == "output" for user in node.users):
                outputs.append(node)
        outputs.sort(key=lambda node: unit.outputs.index(tensor_name(node)))
        return Interface(tuple(inputs), tuple(node.name for node in outputs))

    def extract(self, unit: Unit) -> fx.GraphModule:
        """`unit` as a network that shares all modules, parameters and buffers with this one.

        Takes the tensors `interface(unit).inputs` and returns a tuple with those of `.outputs`.
        """
        reads, returns = self.interface(unit)
        graph = fx.Graph()
        copies = {self.nodes[name]: graph.placeholder(name) for name in reads}
        for node in self._with_constants([n for n in self.members(unit) if n.op not in ("placeholder", "output")]):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[self.nodes[name]] for name in returns))
        return fx.GraphModule(self.graph_module, graph, class_name="Unit")

    def _with_constants(self, own: Sequence[fx.Node]) -> list[fx.Node]:
        """`own` and every constant it needs, in the order of execution."""
        needed = set(own)
        waiting = list(own)
        while waiting:
            found = [n for n in waiting.pop().all_input_nodes if n in self.constants and n not in needed]
            needed.update(found)
            waiting.extend(found)
        return sorted(needed, key=self.position.__getitem__)


def extract(graph_module: fx.GraphModule, unit: Unit) -> fx.GraphModule:
    """One unit of `graph_module`; see `Cutter.extract`."""
    return Cutter(graph_module).extract(unit)
