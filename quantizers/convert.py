"""From a float network to its quantized copy: fold, decide, insert. The only place where networks are rewritten."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from quantizers.base import Quantizer
from quantizers.constraints import constrained
from quantizers.fold import fold
from quantizers.layer import ActivationSite, QuantizedLayer, output_first
from quantizers.operators import Operators
from quantizers.placement import BitWidths, LayerPlan, TensorPlan, plan, weighted_layers
from quantizers.protocol import FLOAT, Protocol
from quantizers.report import QuantizerRow, rows
from quantizers.trace import StoredNorm, Trace

log = logging.getLogger(__name__)
SITES = "activation_sites"  # the sites stand in the student at activation_sites.<node name>


class Conversion(NamedTuple):
    """`student`: the network with quantizers; `reference`: the same graph in float, same node names; `report`: a row
    for each quantizer; `left_float`: what has weights but no quantizer, and why; `opaque`: the modules that could not
    be traced, and why: their layers are quantized in place, what else they compute is not looked into; `norms`: what
    the normalisations stored that were folded into layers or frozen, by module path.
    """

    student: fx.GraphModule
    reference: fx.GraphModule
    report: list[QuantizerRow]
    left_float: dict[str, str]
    opaque: dict[str, str]
    norms: Mapping[str, StoredNorm]


def convert(
    model: nn.Module,
    example: Tensor,
    protocol: Protocol,
    weight: Callable[..., Quantizer],
    activation: Callable[..., Quantizer],
    bits: BitWidths,
    allocation: Mapping[str, tuple[int, int]] | None = None,
    prepare: Callable[[Trace], object] | None = None,
) -> Conversion:
    """Builds the student of `model`, which is left as it is. Weights are initialised, activation ranges are not:
    `calibrate_ranges` does that.

    Args:
        model: the teacher, float, with or without batch normalisation.
        example: one batch (N, C, H, W) of the right shape.
        protocol: which tensors are quantized.
        weight: called as weight(tensor, bits) with the output channels on axis 0.
        activation: called as activation(bits, signed=...).
        bits: widths of the job; 32 leaves that side float.
        allocation: layer path -> (weight bits, bits of its input), for mixed precision.
        prepare: changes the folded float graph in place before anything is decided; the reference has the changes too.

    In the student every node of the reference keeps its name; the node of a site has meta["tensor"], the name of the
    node whose result it quantizes.
    """
    folded = fold(model, example)
    if prepare is not None:
        prepare(folded)
    reference, opaque, norms = folded
    student = copy.deepcopy(reference)
    assert [n.name for n in student.graph.nodes] == [n.name for n in reference.graph.nodes]
    weight, activation = constrained(protocol, weight, activation)
    decided = plan(student, protocol, bits, allocation, opaque)
    left_float = dict(_weights_of_functions(student, opaque))
    left_float |= _weights_read_by_parents(student, example, [p for p in decided.layers if p.inside is not None])
    _insert_sites(student, decided.tensors, activation)
    kept = [p for p in decided.layers if p.path not in left_float]
    _swap_layers(student, kept, weight, activation)
    student.recompile()
    student.eval()
    _move(student, reference)
    if left_float:
        log.warning("%d weights stay in float, among them %s: %s", len(left_float), *next(iter(left_float.items())))
    return Conversion(student, reference, rows(student), left_float, opaque, norms)


def _insert_sites(student: fx.GraphModule, tensors: list[TensorPlan], activation: Callable[..., Quantizer]) -> None:
    for node, bits, signed in tensors:
        site = ActivationSite(activation(bits, signed=signed))
        student.add_submodule(f"{SITES}.{node.name}", site)
        with student.graph.inserting_after(node):
            inserted = student.graph.call_module(f"{SITES}.{node.name}", (node,))
        inserted.meta = {key: node.meta[key] for key in ("scope", "is_tensor", "shape")}
        inserted.meta |= {"tensor": node.name, "signed": signed}
        node.replace_all_uses_with(inserted, delete_user_cb=lambda user, inserted=inserted: user is not inserted)
    student.graph.lint()


def _swap_layers(
    student: fx.GraphModule,
    layers: list[LayerPlan],
    weight: Callable[..., Quantizer],
    activation: Callable[..., Quantizer],
) -> None:
    for path, layer, bits, _, input_bits in layers:
        site = None if input_bits is None else ActivationSite(activation(input_bits, signed=True))
        if bits == FLOAT:
            assert site is not None
            _replace(student, layer, nn.Sequential(site, layer))
            continue
        try:
            quantizer = weight(output_first(layer).detach(), bits)
        except ValueError as error:
            raise ValueError(f"weights of layer {path!r}: {error}") from error
        _replace(student, layer, QuantizedLayer(layer, quantizer, site))


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` at every path at which `old` stands: shared layers stay shared."""
    for path in [path for path, module in root.named_modules(remove_duplicate=False) if module is old]:
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, new)


def _weights_of_functions(student: fx.GraphModule, opaque: dict[str, str]) -> Iterator[tuple[str, str]]:
    operators = Operators(student, opaque)
    layers = {path for path, _, _ in weighted_layers(student, opaque)}
    for node in student.graph.nodes:
        for name in operators.weights_passed(node):
            yield (
                name,
                f"passed to {getattr(node.target, '__name__', node.target)}() as an argument, not called as a layer",
            )
        module = operators.module(node)
        if module is not None and operators.is_heavy(node) and not operators.is_weighted(node):
            own = [name for name, p in module.named_parameters() if p.ndim > 1]
            for name in own:
                path = ".".join(filter(None, (str(node.target), name)))
                if path.rpartition(".")[0] not in layers:
                    yield path, f"a parameter of {type(module).__name__}, which is no plain convolution or linear layer"


class _ReadDetector(nn.Module):
    """Stands in for a layer and notes whether somebody reads its weight instead of calling it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.read = layer, False

    @property
    def weight(self) -> Tensor:
        self.read = True
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


@torch.no_grad()
def _weights_read_by_parents(student: fx.GraphModule, example: Tensor, layers: list[LayerPlan]) -> dict[str, str]:
    """Layers inside opaque modules whose weights their parent uses itself: exchanging the layer would do nothing."""
    if not layers:
        return {}
    detectors = {p.path: _ReadDetector(p.layer) for p in layers}
    for detector in detectors.values():
        _replace(student, detector.layer, detector)
    device = next((p.device for p in student.parameters()), example.device)
    try:
        student(example.to(device))
    finally:
        for detector in detectors.values():
            _replace(student, detector, detector.layer)
    insides = {p.path: p.inside for p in layers}
    return {path: f"its weights are read by {insides[path]!r}" for path, d in detectors.items() if d.read}


def _move(student: nn.Module, reference: nn.Module) -> None:
    device = next((t.device for t in (*reference.parameters(), *reference.buffers())), None)
    if device is not None:
        student.to(device)
