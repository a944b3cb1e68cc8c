"""A student as an ONNX file: integers between QuantizeLinear and DequantizeLinear, as runtimes want them.

ONNX (Open Neural Network Exchange), operator set 21 or later: INT4 since 21, INT2 since 25. Each node of the traced
graph is written by itself, so that what a runtime computes can be compared tensor by tensor (see `parity`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from deployment.containers import Container, activation_storage, check_container
from deployment.onnx_call import Call, arguments_of
from deployment.onnx_graph import OnnxGraph
from deployment.onnx_layers import Layers, quantized
from deployment.onnx_operators import WRITERS, clip, clip_bounds
from deployment.onnx_values import Facts, Value, Values, facts_of
from deployment.origins import LOGITS
from deployment.packages import require
from deployment.whole_file import expect_no_folder, whole_file
from quantizers.layer import WEIGHTED, ActivationSite, QuantizedLayer
from quantizers.operators import Operators

INPUT, OUTPUT, BATCH = "images", LOGITS, "batch"
# onnxruntime takes a QuantizeLinear to the other side of these, where it joins it to a layer and rounds the bias
MOVED_ACROSS = {
    "maxpool2d", "flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "getitem",
    "contiguous", "clone", "detach", "identity", "float",
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        model: the ONNX model (a ModelProto).
        sites: path of each quantized tensor in the student -> name of its integers in the model.
        biases: path of each layer with its bias in integers -> what these stand for (C,).
        float_biases: layers with quantized weights and a float bias, and why.
        weight_bytes: of all initializers.
    """

    model: Any
    sites: dict[str, str]
    biases: dict[str, Tensor]
    float_biases: dict[str, str]
    weight_bytes: int

    def save(self, path: str | Path) -> Path:
        """Write the model, by a temporary name and a rename."""
        path = Path(path)
        expect_no_folder(path)
        with whole_file(path) as temporary:
            temporary.write_bytes(self.model.SerializeToString())
        return path


def export_onnx(
    student: fx.GraphModule,
    input_size: Sequence[int],
    *,
    container: Container = "auto",
    opset: int | None = None,
    facts: Mapping[str, str] | None = None,
) -> Exported:
    """Writes a student as an ONNX model with a dynamic batch; what is switched off (`float_mode`) is written as float.

    Args:
        student: as `convert` makes it, its roundings final.
        input_size: (C, H, W) of an image; the model takes normalised images (N, C, H, W), float32, named `images`.
        container: see `deployment.containers`.
        opset: None is the lowest that has the container's types, 21 or 25.
        facts: go into the model's metadata, beside calibrant's version and the container.

    Raises:
        ValueError: if onnx is not installed or too old, an argument is wrong, an operator cannot be written, or
            roundings are not final.
    """
    opset = check_container(container, opset)
    expect_known(opset)
    walk = _Walk(student, tuple(input_size), container)
    output = walk.run()
    graph, helper, types = walk.graph, walk.graph.helper, walk.graph.types
    shape = walk.shapes[output]
    graph.nodes.append(helper.make_node("Identity", [walk.floats(output)], [OUTPUT], name=OUTPUT))
    ends = [(INPUT, [BATCH, *input_size]), (OUTPUT, [BATCH if size is None else size for size in shape])]
    infos = [helper.make_tensor_value_info(name, types.FLOAT, dims) for name, dims in ends]
    whole = helper.make_graph(graph.nodes, "calibrant", infos[:1], infos[1:], initializer=graph.constants)
    model = helper.make_model(whole, opset_imports=[helper.make_opsetid("", opset)], producer_name="calibrant")
    model.ir_version = helper.find_min_ir_version_for(model.opset_import)
    helper.set_model_props(model, {"container": container, "calibrant": _version()} | dict(facts or {}))
    require("onnx.checker").check_model(model, full_check=True)
    return Exported(model, walk.sites, walk.layers.biases, walk.layers.float_biases, graph.weight_bytes)


class _Walk:
    """Writes the nodes of a student in their order."""

    def __init__(self, student: fx.GraphModule, input_size: tuple[int, ...], container: str) -> None:
        self.student, self.container = student, container
        self.graph = OnnxGraph()
        for name in (INPUT, OUTPUT):
            self.graph.name(name)
        self.values = Values(self.graph)
        self.layers = Layers(self.values, container)
        self.operators = Operators(student)
        self.facts: dict[fx.Node, Facts] = facts_of(student, input_size)
        self.sites: dict[str, str] = {}

    @functools.cached_property
    def shapes(self) -> dict[fx.Node, tuple[int | None, ...]]:
        return {node: facts.shape for node, facts in self.facts.items() if facts.shape is not None}

    def floats(self, node: fx.Node) -> str:
        return self.values.floats(self._value(node))

    def run(self) -> fx.Node:
        """Writes all nodes and returns the one that the network gives back."""
        for node in self.student.graph.nodes:
            if node.op == "output":
                (output,) = node.args
                if not isinstance(output, fx.Node) or output not in self.values:
                    raise ValueError(f"export: expected a network that returns one tensor, got {output}")
                return output
            if node.op == "placeholder":
                self.values[node] = Value(INPUT)
            elif node.op != "get_attr" and (node in self.shapes or self.operators.name(node) in ("chunk", "split")):
                self._write(node)
        raise AssertionError("a graph ends in its output")

    def _write(self, node: fx.Node) -> None:
        module, name = self.operators.module(node), self.operators.name(node)
        if isinstance(module, ActivationSite):
            self._write_site(node, module)
        elif isinstance(module, (QuantizedLayer, *WEIGHTED)):
            source = node.all_input_nodes[0]
            facts: dict[str, Any] = {
                "rank": len(self.shapes[source]),
                "output_quantized": self._site_behind(node) is not None,
            }
            self.values[node] = self.layers.write(str(node.target), module, self._value(source), node.name, **facts)
        elif self._clip(node) is None or not self._is_left_to_its_site(node):
            call = Call(node, arguments_of(node, name, module), self.values, self.facts)
            bounds = clip_bounds(name, call.arguments)
            if bounds is None and name not in WRITERS:
                why = "a module that could not be traced" if module is not None else "an operator"
                raise ValueError(
                    f"export: no ONNX for {node.name} ({name}, {why}); known are convolutions, linear layers and "
                    f"{', '.join(sorted(WRITERS))}. Save the student instead: deployment.plain makes it PyTorch's own"
                )
            self.values[node] = WRITERS[name](call) if bounds is None else clip(call, bounds)

    def _value(self, node: fx.Node) -> Value:
        value = self.values[node]
        assert isinstance(value, Value)
        return value

    def _clip(self, node: fx.Node) -> tuple[float, float] | None:
        name = self.operators.name(node)
        return clip_bounds(name, arguments_of(node, name, self.operators.module(node))) if node.args else None

    def _is_left_to_its_site(self, node: fx.Node) -> bool:
        """A clip that only a quantizer reads is done by the quantizer's ends."""
        (reader, *others) = node.users
        module = self.operators.module(reader)
        return not others and isinstance(module, ActivationSite) and module.enabled

    def _site_behind(self, node: fx.Node) -> ActivationSite | None:
        """The quantizer that alone reads a node, through clips and what onnxruntime moves a QuantizeLinear across."""
        while len(readers := [user for user in node.users if user in self.shapes or user.op == "output"]) == 1:
            (node,) = readers
            module = self.operators.module(node)
            if isinstance(module, ActivationSite):
                return module if module.enabled else self._site_behind(node)
            if self.operators.name(node) not in MOVED_ACROSS and self._clip(node) is None:
                return None
        return None

    def _write_site(self, node: fx.Node, site: ActivationSite) -> None:
        source, bounds = node.all_input_nodes[0], None
        if source not in self.values:
            bounds, source = self._clip(source), source.all_input_nodes[0]
        value = self._value(source)
        if site.enabled:
            moves = self.operators.name(source) in MOVED_ACROSS and value.floats is not None
            if moves and activation_storage(site.quantizer.grid, self.container).bits != 8:
                value = Value(self.graph.unchanged(str(value.floats)))  # MaxPool and Clip know no 4 bits
            tensor = str(node.meta.get("tensor", node.name))
            value = quantized(self.values, value, site, tensor, self.container, bounds)
            assert value.integers is not None
            self.sites[str(node.target)] = value.integers.name
        self.values[node] = value


def expect_known(opset: int, argument: str = "export.opset") -> None:
    """Raises ValueError for an operator set that the installed onnx does not have yet."""
    onnx = require("onnx")
    known = require("onnx.defs").onnx_opset_version()
    if opset > known:
        raise ValueError(
            f"{argument}: expected at most {known}, the highest of the installed onnx {onnx.__version__}, got {opset}; "
            "leave it out, or pip install --upgrade onnx (container int2 needs at least 25)"
        )


def _version() -> str:
    try:
        return version("calibrant")
    except PackageNotFoundError:
        return "source"
