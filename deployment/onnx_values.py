"""What the tensors of a traced network are in ONNX, and what is known of their shapes for any batch size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from deployment.onnx_graph import OnnxGraph, Storage


class Integers(NamedTuple):
    """A tensor in integers: `(integers - zero_point) * scale`. `name`, `scale`, `zero_point` are ONNX names."""

    name: str
    scale: str
    zero_point: str
    step: Tensor  # () float32
    storage: Storage


class Value(NamedTuple):
    """A tensor as floats, as integers, or as both."""

    floats: str | None
    integers: Integers | None = None


class Facts(NamedTuple):
    """A node's result: `shape` with None for axes that grow with the batch; `constant`: what it is where it
    is no tensor or does not depend on the input."""

    shape: tuple[int | None, ...] | None
    constant: Any


class _Recorder(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.others: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        if n.op == "get_attr" or not isinstance(value, Tensor):
            self.others[n] = value
        return value


@torch.no_grad()
def facts_of(student: fx.GraphModule, input_size: tuple[int, ...]) -> dict[fx.Node, Facts]:
    """Runs the student on batches of two and of three images: what differs is the batch."""
    first = next((t for t in (*student.parameters(), *student.buffers())), torch.zeros(()))
    runs = []
    for batch in (2, 3):
        runs.append(_Recorder(student))
        runs[-1].run(torch.zeros(batch, *input_size, device=first.device))
    two, three = runs
    found = {}
    for node in student.graph.nodes:
        shapes = two.shapes.get(node), three.shapes.get(node)
        shape = None
        if shapes[0] is not None and shapes[1] is not None:
            shape = tuple(a if a == b else None for a, b in zip(*shapes, strict=True))
        found[node] = Facts(shape, two.others.get(node))
    return found


class Values:
    """The values of the nodes written so far, and the graph they stand in."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self._of: dict[fx.Node, Value | list[Value]] = {}
        self._dequantized: dict[str, str] = {}

    def __setitem__(self, node: fx.Node, value: Value | list[Value]) -> None:
        self._of[node] = value

    def __getitem__(self, node: fx.Node) -> Value | list[Value]:
        return self._of[node]

    def __contains__(self, node: object) -> bool:
        return node in self._of

    def floats(self, value: Value) -> str:
        """The name of a value as floats; integers are dequantized once, behind the node that made them."""
        if value.floats is not None:
            return value.floats
        assert value.integers is not None
        name, scale, zero_point, *_ = value.integers
        if name not in self._dequantized:
            inputs = [name, scale, zero_point]
            self._dequantized[name] = self.graph.add("DequantizeLinear", inputs, f"{name}_dequantized")
        return self._dequantized[name]
