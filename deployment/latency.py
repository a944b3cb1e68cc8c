"""How long models take in a runtime: in turns within one run, warm, medians; each operator, and each layer by itself.

Only ratios of one run say anything: the same machine, the same minutes, as many threads. Integer kernels depend on the
shape of a layer and on the processor, not on the bits below 8.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from deployment.containers import Container
from deployment.onnx_export import INPUT, export_onnx
from deployment.onnx_values import facts_of
from deployment.runtime import Loaded, Runtime, load, session
from quantizers.layer import WEIGHTED, ActivationSite, QuantizedLayer, float_mode
from quantizers.operators import CLIPS, Operators
from quantizers.protocol import FLOAT

HEAVY = ("Conv", "Gemm", "MatMul")  # in the names of the operators that layers become


@dataclass(frozen=True, kw_only=True)
class Latency:
    """`milliseconds`: median of a call; `speedup`: how many times faster than the first model in the same runtime,
    median over rounds."""

    model: str
    runtime: Runtime
    milliseconds: float
    speedup: float


@dataclass(frozen=True, kw_only=True)
class OperatorTime:
    """One operator of the graph as the runtime fused it; `microseconds`: median of a call."""

    name: str
    operator: str
    microseconds: float


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One layer by itself: its kernel at these bits (32 is float), and how long it takes, median of a call."""

    layer: str
    w_bits: int
    a_bits: int
    kernel: str
    microseconds: float


def latencies(
    models: Mapping[str, Path | bytes],
    images: Tensor,
    *,
    runtimes: Sequence[Runtime] = ("onnxruntime",),
    threads: int = 1,
    rounds: int = 9,
    seconds: float = 0.3,
) -> list[Latency]:
    """Runs the models in turns on the same images (N, C, H, W).

    Args:
        models: by name; speedups refer to the first.
        images: one batch.
        runtimes: every model is timed in each.
        threads: inside an operator.
        rounds: turns of each model; an odd number.
        seconds: length of a turn, at least three calls; the first call of a turn warms up and does not count.
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    if rounds < 1 or rounds % 2 == 0:
        raise ValueError(f"rounds: expected an odd number, so that one of them is the median, got {rounds}; try 9")
    feed = {INPUT: images.numpy()}
    loaded: dict[tuple[Runtime, str], Loaded] = {
        (runtime, name): load(model, runtime, threads=threads) for runtime in runtimes for name, model in models.items()
    }
    turns: dict[tuple[Runtime, str], list[float]] = {key: [] for key in loaded}
    calls: dict[tuple[Runtime, str], list[float]] = {key: [] for key in loaded}
    for _ in range(rounds):
        for key, model in loaded.items():
            times = model.turn(feed, seconds)
            turns[key].append(statistics.median(times))
            calls[key] += times
    first = next(iter(models))
    return [
        Latency(
            model=name,
            runtime=runtime,
            milliseconds=1e3 * statistics.median(calls[runtime, name]),
            speedup=statistics.median(a / b for a, b in zip(turns[runtime, first], own, strict=True)),
        )
        for (runtime, name), own in turns.items()
    ]


def operator_times(
    model: Path | bytes, images: Tensor, *, threads: int = 1, calls: int = 20, optimize: bool = True
) -> list[OperatorTime]:
    """The runtime's own profile, in order of execution; the first quarter of the calls warms up."""
    with tempfile.TemporaryDirectory() as folder:
        run = session(model, threads=threads, optimize=optimize, profile=Path(folder) / "profile")
        for _ in range(calls):
            run.run(None, {INPUT: images.numpy()})
        events = json.loads(Path(run.end_profiling()).read_text())
    suffix, seen = "_kernel_time", {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(suffix):
            key = event["name"].removesuffix(suffix), event["args"]["op_name"]
            seen.setdefault(key, []).append(event["dur"])
    return [
        OperatorTime(name=name, operator=operator, microseconds=statistics.median(times[len(times) // 4 :]))
        for (name, operator), times in seen.items()
    ]


def layer_times(
    student: fx.GraphModule,
    input_size: tuple[int, ...],
    *,
    batch: int = 1,
    threads: int = 1,
    container: Container = "auto",
    calls: int = 40,
) -> list[LayerTime]:
    """Every layer by itself, in float and as the student has it: which kernel it becomes, and how fast about that is.

    The time is that of the kernel alone, in a model of that layer: quantized input, layer, quantized output where the
    student has them; the profiler counts whole microseconds. A layer that is called several times has a row for each
    input size. For choosing bits see `latency_table`.
    """
    rows: dict[tuple[str, tuple[int, ...]], list[LayerTime]] = {}
    for path, single, images in layers_alone(student, input_size, batch):
        if (path, tuple(images.shape)) not in rows:
            rows[path, tuple(images.shape)] = _timed(single, path, images, threads, calls, container)
    return [row for found in rows.values() for row in found]


def layers_alone(
    student: fx.GraphModule, input_size: tuple[int, ...], batch: int
) -> Iterator[tuple[str, fx.GraphModule, Tensor]]:
    """Every call of a layer by itself: its path, a network of it and the sites around it, and noise as its input."""
    operators, facts = Operators(student), facts_of(student, input_size)
    for node in student.graph.nodes:
        if not isinstance(operators.module(node), (QuantizedLayer, *WEIGHTED)):
            continue
        shape = facts[node.all_input_nodes[0]].shape
        assert shape is not None
        size = tuple(int(s or batch) for s in shape[1:])
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
        yield str(node.target), _alone(student, node, operators), images


def first_module(single: fx.GraphModule) -> nn.Module:
    """What a layer alone begins with: the site before it, or itself."""
    return single.get_submodule(str(next(n for n in single.graph.nodes if n.op == "call_module").target))


def _alone(student: fx.GraphModule, node: fx.Node, operators: Operators) -> fx.GraphModule:
    """The layer with the sites around it; pooling and reshaping are left out."""
    site = operators.source(node.all_input_nodes[0])
    chain = [site, node] if isinstance(operators.module(site), ActivationSite) else [node]
    reader = next(iter(node.users))
    if operators.name(reader) in CLIPS:
        chain.append(reader)
        reader = next(iter(reader.users))
    if isinstance(operators.module(reader), ActivationSite):
        chain.append(reader)
    graph = fx.Graph()
    last = graph.placeholder("x")
    for link in chain:
        last = graph.node_copy(link, lambda _, last=last: last)
    graph.output(last)
    return fx.GraphModule(student, graph)


def _timed(
    single: fx.GraphModule,
    path: str,
    images: Tensor,
    threads: int,
    calls: int,
    container: Container,
) -> list[LayerTime]:
    quantized = _kernel(single, images, threads, calls, container)
    with float_mode(single):
        floating = _kernel(single, images, threads, calls, container)
    layer = single.get_submodule(path)
    w_bits = layer.weight_quantizer.grid.bits if isinstance(layer, QuantizedLayer) else FLOAT
    site = first_module(single)
    a_bits = site.quantizer.grid.bits if isinstance(site, ActivationSite) and site.enabled else FLOAT
    found = [(FLOAT, FLOAT, floating), (w_bits, a_bits, quantized)]
    return [
        LayerTime(layer=path, w_bits=w, a_bits=a, kernel=kernel.operator, microseconds=kernel.microseconds)
        for w, a, kernel in found
    ]


def _kernel(single: fx.GraphModule, images: Tensor, threads: int, calls: int, container: Container) -> OperatorTime:
    model = export_onnx(single, tuple(images.shape[1:]), container=container).model.SerializeToString()
    found = operator_times(model, images, threads=threads, calls=calls)
    layers = [row for row in found if any(name in row.operator for name in HEAVY)]
    return max(layers or found, key=lambda row: row.microseconds)
