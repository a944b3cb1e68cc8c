"""What each layer would take at every pair of widths: the table by which bits are allocated under a budget of latency.

A layer is written alone at a pair and optimized by the runtime; the kernels found there run many times within one call,
so that neither the start of a call nor a clock of whole microseconds counts. What is written alike runs alike and is
timed once: most widths share kernels, and no choice between those is left to noise.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx

from deployment.containers import Container
from deployment.latency import HEAVY, first_module, layers_alone
from deployment.onnx_export import INPUT, export_onnx
from deployment.packages import require
from deployment.runtime import has_vnni, session
from deployment.timing import turn
from quantizers.calibrate import calibrate_ranges
from quantizers.layer import ActivationSite, QuantizedLayer, output_first, quantized_layers, sites
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import FLOAT
from quantizers.ranges import MinMax

WIDTHS = (2, 3, 4, 5, 6, 7, 8, FLOAT)
ALIKE = {3: 4, 5: 7, 6: 7}  # widths that every container stores as this one
LAYOUT = ("Transpose", "ReorderInput", "ReorderOutput")  # around a layer alone; in a network at its ends only
COPIES, LONG_ENOUGH = 32, 2e-3  # of a kernel in a call at most; seconds
TURN = 0.02  # seconds
SEVEN_BITS = 64


@dataclass(frozen=True, kw_only=True)
class PairTime:
    """A row as allocation reads it: bits (32 is float), and milliseconds an image."""

    layer: str
    weight: int
    activation: int
    milliseconds: float


def latency_table(
    student: fx.GraphModule,
    input_size: tuple[int, ...],
    *,
    batch: int = 1,
    threads: int = 1,
    container: Container = "auto",
    rounds: int = 9,
) -> list[PairTime]:
    """Every layer at every pair of `WIDTHS`, from integers to integers where the student has them.

    Container and processor decide which kernel computes a pair; what `container` is, see `deployment.containers`.
    Counted is what the layer itself brings along: its kernel, the end that activations of fewer than 8 bits have (Min),
    and for a float kernel the conversions to float and back. A layer that is called several times is the sum of its
    calls. Its output has the width of its input. A student without quantized activations has rows for 32 alone; pairs
    that the runtime refuses in this container have none.
    """
    symmetric = all(layer.weight_quantizer.grid.symmetric for _, layer in quantized_layers(student))
    activations = WIDTHS if any(site.enabled for _, site in sites(student)) else (FLOAT,)
    clock = _Clock(threads, rounds)
    found: dict[tuple[str, int, int], float] = {}
    for path, single, images in layers_alone(student, input_size, batch):
        seconds_at = _alike(single, path, images, symmetric, clock, container)
        for pair in ((w, a) for w in WIDTHS for a in activations):
            key = path, *pair
            spent = seconds_at(*(ALIKE.get(width, width) for width in pair))
            found[key] = found.get(key, 0.0) + 1e3 * spent / batch
    return [
        PairTime(layer=p, weight=w, activation=a, milliseconds=round(t, 6))
        for (p, w, a), t in found.items()
        if isfinite(t)
    ]


def _alike(
    single: fx.GraphModule, path: str, images: Tensor, symmetric: bool, clock: _Clock, container: Container
) -> Callable[[int, int], float]:
    """The seconds of a layer by its widths."""

    @cache
    def spent(weight: int, activation: int) -> float:
        written = _at(single, path, (weight, activation), images, symmetric)
        return clock.seconds_of(export_onnx(written, tuple(images.shape[1:]), container=container).model, images)

    return spent


def _at(single: fx.GraphModule, path: str, pair: tuple[int, int], images: Tensor, symmetric: bool) -> fx.GraphModule:
    """A copy with new quantizers: of what the weights and ranges are, kernels do not depend."""
    changed = copy.deepcopy(single)
    module, (weight, activation) = changed.get_submodule(path), pair
    layer = module.layer if isinstance(module, QuantizedLayer) else module
    if weight != FLOAT:
        quantizer = Nearest(output_first(layer).detach(), weight, symmetric=symmetric, range=MinMax())
        layer = QuantizedLayer(layer, quantizer)
    changed.set_submodule(path, layer)
    first = first_module(changed)
    reads_integers = isinstance(first, ActivationSite)
    writes = 8 if not reads_integers and weight != FLOAT else activation  # a float image is followed by 8 bits
    for name, site in list(sites(changed)):
        width = activation if site is first else writes
        grid = site.quantizer.grid
        bits = 8 if width == FLOAT else width
        ranged = NearestActivation(bits, signed=not grid.one_sided, symmetric=grid.symmetric, range=MinMax())
        changed.set_submodule(name, ActivationSite(ranged))
    calibrate_ranges(changed, images, batch_size=len(images))
    for _, site in sites(changed):
        site.enabled = (activation if site is first_module(changed) else writes) != FLOAT
    return changed.eval()


class _Clock:
    """Times layers by their kernels, equal ones once."""

    def __init__(self, threads: int, rounds: int) -> None:
        self.threads, self.rounds = threads, rounds
        self._layers: dict[Any, float] = {}
        self._kernels: dict[Any, float] = {}

    def seconds_of(self, model: Any, images: Tensor) -> float:
        """How long the layer in this model takes; infinity where the runtime refuses it."""
        key = (tuple(images.shape), *_written(model))
        if key not in self._layers:
            try:
                self._layers[key] = sum(self._of_each_kernel(model, {INPUT: images.numpy()}))
            except require("onnxruntime").capi.onnxruntime_pybind11_state.InvalidGraph:
                # onnxruntime 1.32 makes QLinearConv of 4-bit inputs, which that does not take
                self._layers[key] = inf
        return self._layers[key]

    def _of_each_kernel(self, model: Any, feed: dict[str, Any]) -> Iterator[float]:
        optimized = fused(model.SerializeToString(), self.threads)
        kinds, constants = _kinds(optimized, feed), _constants(optimized)
        for node in layer_nodes(list(optimized.graph.node)):
            key = _described(node, kinds, constants)
            if key not in self._kernels:
                self._kernels[key] = self._measured(optimized, node.name, feed)
            yield self._kernels[key]

    def _measured(self, optimized: Any, name: str, feed: dict[str, Any]) -> float:
        """From calls with the kernel once and many times, in turns: the difference is the kernel's."""
        once = session(optimized.SerializeToString(), threads=self.threads, optimize=False)
        length = statistics.median(turn(partial(once.run, None, feed), 0.0))
        copies = max(1, min(COPIES, round(LONG_ENOUGH / length)))
        often = session(repeated(optimized, name, copies), threads=self.threads, optimize=False)
        differences = []
        for _ in range(self.rounds):
            one, many = (statistics.median(turn(partial(run.run, None, feed), TURN)) for run in (once, often))
            differences.append(many - one)
        return max(0.0, statistics.median(differences) / copies)


def _written(model: Any) -> Iterator[Any]:
    """What decides which kernels run: operators, types and shapes of constants, whether weights have zero points, and
    where the processor has no VNNI whether they exceed 7 bits."""
    constants, kinds = _constants(model), _stored(model)
    for node in model.graph.node:
        yield node.op_type, *_attributes(node)
        for name in node.input:
            if name in constants:
                values = constants[name]
                wide = name.endswith("weight_integers") and not has_vnni() and float(abs(values).max()) > SEVEN_BITS
                yield kinds[name], name.endswith("weight_zero_point") and bool(values.any()), wide


def _described(node: Any, kinds: dict[str, Any], constants: dict[str, Any]) -> tuple[Any, ...]:
    """A kernel by operator, attributes, types and shapes of its inputs, and whether its weights have zero points."""
    inputs = [kinds[name] for name in node.input if name]
    shifted = node.op_type == "QLinearConv" and bool(constants[node.input[5]].any())
    return node.domain, node.op_type, *_attributes(node), *inputs, shifted


def _attributes(node: Any) -> list[bytes]:
    return [attribute.SerializeToString() for attribute in sorted(node.attribute, key=lambda a: a.name)]


def _constants(model: Any) -> dict[str, Any]:
    to_array = require("onnx").numpy_helper.to_array
    return {constant.name: np.asarray(to_array(constant)).astype(float) for constant in model.graph.initializer}


def _stored(model: Any) -> dict[str, Any]:
    """Type and shape of constants."""
    return {constant.name: (constant.data_type, *constant.dims) for constant in model.graph.initializer}


def fused(model: bytes, threads: int) -> Any:
    """The model as the runtime optimizes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, threads=threads, optimized=path)
        return require("onnx").load(str(path))


def _kinds(optimized: Any, feed: dict[str, Any]) -> dict[str, Any]:
    """Type and shape of every tensor of a model, by name."""
    onnx, watched = require("onnx"), copy.deepcopy(optimized)
    del watched.graph.output[:]
    names = [name for node in watched.graph.node for name in node.output if name]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    given = {name: require("onnxruntime").OrtValue.ortvalue_from_numpy(values) for name, values in feed.items()}
    made = session(watched.SerializeToString(), optimize=False).run_with_ort_values(names, given)
    found = given | dict(zip(names, made, strict=True))
    return _stored(optimized) | {name: (value.data_type(), *value.shape()) for name, value in found.items()}


def layer_nodes(nodes: list[Any]) -> list[Any]:
    """Of an optimized model of one layer those that belong to the layer, in order of execution."""
    at = next(i for i, node in enumerate(nodes) if any(name in node.op_type for name in HEAVY))
    before = [node for node in nodes[:at] if node.op_type not in ("QuantizeLinear", *LAYOUT)]
    if nodes[at].op_type.startswith("Q"):  # an integer kernel makes integers itself: what follows is the next layer's
        return [*before, nodes[at]]
    until = list(takewhile(lambda node: node.op_type != "QuantizeLinear", nodes[at + 1 :]))
    behind = nodes[at + 1 : at + 2 + len(until)]
    return [*before, nodes[at], *(node for node in behind if node.op_type not in LAYOUT)]


def repeated(optimized: Any, name: str, copies: int) -> bytes:
    """The same optimized model with one node so many times more, their results unused."""
    model, nodes = copy.deepcopy(optimized), list(optimized.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.append(node)
        for i in range(copies if node.name == name else 0):
            copied = model.graph.node.add()
            copied.CopyFrom(node)
            copied.name = f"{name}_copy_{i}"
            copied.output[:] = [f"{output}_copy_{i}" if output else "" for output in node.output]
    return model.SerializeToString()
