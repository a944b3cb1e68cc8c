"""Whether a runtime computes from the exported file what the student computes, tensor by tensor.

Floating point sums differ in their order, integer kernels multiply by other scales: a tensor may be off by one step
where it lay on the edge between two. Such a step would show in all layers behind it, so each tensor is compared on the
runtime's own inputs: the student is run with every quantized tensor replaced by the runtime's. Then elements may differ
only where they lie on an edge, few do, and the logits are the same up to the rounding of floats, so that every image is
predicted alike unless two of its logits are equal within that. Biases that the file has in integers are rounded in the
student as well: what that costs is the difference between the two students.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from deployment.onnx_export import INPUT, OUTPUT, Exported
from deployment.origins import Origin, origins_of
from deployment.packages import require
from deployment.runtime import Runtime, load

STEPS = 1  # that a quantized tensor may be off
SHARE = 1e-3  # of its elements that may differ; a tie is decided otherwise in one of 10,000 at most
FEW = 2  # elements that may differ in any tensor, however small
EDGE = 0.002  # steps that an element which differs may lie away from the edge between two; floats are off by 1.5e-4
RELATIVE = 1e-5  # that the logits may be off, of their largest; floats are off by 4e-7
PART = 16  # images whose tensors are in memory at a time


class ParityError(RuntimeError):
    """The exported model and the student disagree."""


@dataclass(frozen=True, kw_only=True)
class TensorParity:
    """One tensor over all images, on the runtime's own inputs; zero is what a bound does not apply to.

    Attributes:
        tensor: name of the node that gives it, or `logits`.
        layer: path of the layer that it comes from; empty where it comes from none, as a sum of quantized tensors.
        elements: compared.
        steps: the largest difference, in steps of its grid.
        share: of the elements that differ; those with the same value in the same images count once, since a plain
            background is one tie.
        edge: the largest distance of an element that differs from the edge between two steps, in steps.
        relative: the largest difference of the logits, of their largest absolute value.
        leeway: factor on the bounds of `share`, `edge` and `relative`: the layers since the last quantized tensor,
            whose rounding of floats adds up, and how much finer its steps are than those of 8 bits.
    """

    tensor: str
    layer: str
    elements: int
    steps: float = 0.0
    share: float = 0.0
    edge: float = 0.0
    relative: float = 0.0
    leeway: float = 1.0

    @property
    def fault(self) -> str:
        """What passes a bound, in words; empty where nothing does."""
        if not self.relative <= RELATIVE * self.leeway:
            return f"{self.relative:.2g} of their largest apart, where {RELATIVE * self.leeway:.2g} is rounding"
        if not self.steps <= STEPS:
            return f"{self.steps:.0f} steps apart, where {STEPS} is a tie"
        edge = min(EDGE * self.leeway, 0.25)
        if not self.edge <= edge:
            return f"rounded otherwise {self.edge:.2g} steps away from the edge between two, where {edge:.2g} is a tie"
        if not self.share * self.elements <= FEW + SHARE * self.leeway * self.elements:
            return f"apart in more elements than the {SHARE * self.leeway:.2g} that can be ties"
        return ""


class Parity(NamedTuple):
    """`rows`: quantized tensors in order of execution, then the logits. `images`: compared. `alike`: of these are
    predicted alike on the runtime's own inputs; the others are ties where the logits agree.
    """

    rows: list[TensorParity]
    images: int
    alike: int
    runtime: Runtime = "onnxruntime"


class _Compared:
    """Replaces what a site gives by what the runtime gave, and keeps how far the two are apart."""

    def __init__(self, tensor: str, origin: Origin) -> None:
        self.tensor, self.origin = tensor, origin
        self.seen: Any = None  # the runtime's integers for the images to come
        self.elements = self.different = self.steps = 0
        self.edge, self.bits = 0.0, 8

    def __call__(self, site: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        quantizer, (x,) = site.quantizer, inputs
        q, scale, zero_point = quantizer.integers(x)
        grid = quantizer.grid
        if self.seen.shape != q.shape:
            raise ParityError(
                f"export: expected a tensor of shape {tuple(q.shape)} from the runtime, got {self.seen.shape}, at "
                f"{self.tensor} (layer {self.origin.layer}), the first tensor that differs"
            )
        theirs = torch.from_numpy(self.seen.astype("int32")) + grid.low
        apart = q != theirs
        self.bits, self.elements = grid.bits, self.elements + q.numel()
        if apart.any():
            differing = x[apart].double()
            self.different += len(differing.unique())
            self.steps = max(self.steps, int((q - theirs).abs().max()))
            exact = (differing / scale.double() + zero_point.double()).clamp(grid.low, grid.high)
            self.edge = max(self.edge, float((exact - theirs[apart]).abs().max()) - 0.5)
        return (theirs - zero_point) * scale

    def row(self) -> TensorParity:
        found = {"steps": float(self.steps), "share": self.different / max(self.elements, 1), "edge": self.edge}
        leeway = float(max(self.origin.layers, 1) * 2 ** max(self.bits - 8, 0))
        return TensorParity(tensor=self.tensor, layer=self.origin.layer, elements=self.elements, leeway=leeway, **found)


class _Logits:
    """Keeps how far the logits are apart, and how many images are predicted alike."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.images = self.alike = self.elements = 0
        self.off, self.largest = 0.0, 1e-12

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        comparable = ours.shape == theirs.shape and bool(torch.isfinite(theirs).all())
        off = float((ours - theirs).abs().max()) if comparable else float("inf")
        self.off, self.largest = max(self.off, off), max(self.largest, float(ours.abs().max()))
        self.images, self.elements = self.images + len(ours), self.elements + ours.numel()
        if ours.shape == theirs.shape:
            self.alike += int((ours.argmax(1) == theirs.argmax(1)).reshape(len(ours), -1).all(1).sum())

    def row(self) -> TensorParity:
        layer, layers = self.origin
        relative = self.off / self.largest
        return TensorParity(
            tensor=OUTPUT, layer=layer, elements=self.elements, relative=relative, leeway=float(max(layers, 1))
        )


@torch.no_grad()
def compare(
    student: fx.GraphModule,
    exported: Exported,
    batches: Iterable[Tensor],
    *,
    limit: int | None = None,
    threads: int = 1,
    runtime: Runtime = "onnxruntime",
) -> Parity:
    """Compares every quantized tensor and the logits; the tensors of a few images are in memory at a time.

    Args:
        student: what was exported, on the CPU.
        exported: what `export_onnx` gave.
        batches: of images (N, C, H, W), normalised; others than those of the calibration.
        limit: compare the first so many images; None: all.
        threads: of the runtime.
        runtime: what runs the file.

    Raises:
        ValueError: if there is no image.
    """
    rounded = with_rounded_biases(student, exported)
    origins = origins_of(rounded)
    names = {str(node.target): str(node.meta.get("tensor", node.name)) for node in rounded.graph.nodes}
    sites = {path: _Compared(names[path], origins[path]) for path in exported.sites}
    logits = _Logits(origins[OUTPUT])
    run = load(_with_outputs(rounded, exported), runtime, threads=threads)
    outputs = [OUTPUT, *(f"{name}_seen" for name in exported.sites.values())]
    with _on_the_runtimes_inputs(rounded, sites):
        for images in _parts(batches, limit):
            theirs, *integers = run.run(outputs, {INPUT: images.numpy()})
            for site, found in zip(sites.values(), integers, strict=True):
                site.seen = found
            logits.add(rounded(images), torch.from_numpy(theirs))
    if not logits.images:
        raise ValueError("images: expected at least one image to compare, got none")
    rows = [*(site.row() for site in sites.values()), logits.row()]
    return Parity(rows, logits.images, logits.alike, runtime)


def expect_parity(found: Parity) -> None:
    """Raises `ParityError` naming the first tensor that is off by more than floats are, and its layer."""
    wrong = next((row for row in found.rows if row.fault), None)
    if wrong is None:
        return
    layer = f" (layer {wrong.layer})" if wrong.layer else ""
    if wrong.tensor == OUTPUT:
        what = (
            f"expected the logits{layer} of {found.runtime} and student to be alike, got them {wrong.fault}; "
            f"{found.images - found.alike} of {found.images} images are predicted otherwise"
        )
    else:
        what = (
            f"expected the same integers from {found.runtime} and student up to ties, got them {wrong.fault}, at "
            f"{wrong.tensor}{layer}, the first tensor that differs ({100 * wrong.share:.2g} % of its elements)"
        )
    raise ParityError(
        f"export: {what}; a container without integer kernels (export.container=int4) tells whether it is these"
    )


def with_rounded_biases(student: fx.GraphModule, exported: Exported) -> fx.GraphModule:
    """A copy of the student with the biases that the file has: those in integers rounded."""
    rounded = copy.deepcopy(student)
    for path, bias in exported.biases.items():
        layer: Any = rounded.get_submodule(path)
        layer.layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return rounded


def _parts(batches: Iterable[Tensor], limit: int | None) -> Iterator[Tensor]:
    left = sys.maxsize if limit is None else limit
    for batch in batches:
        yield from batch[:left].split(PART)
        left -= len(batch)
        if left <= 0:
            return


@contextmanager
def _on_the_runtimes_inputs(student: fx.GraphModule, sites: Mapping[str, _Compared]) -> Iterator[None]:
    handles = [student.get_submodule(path).register_forward_hook(compared) for path, compared in sites.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_outputs(student: fx.GraphModule, exported: Exported) -> bytes:
    """The model with all integer tensors as further outputs, in bytes, or two of them for wider grids."""
    onnx = require("onnx")
    probed = onnx.ModelProto()
    probed.CopyFrom(exported.model)
    for path, name in exported.sites.items():
        site: Any = student.get_submodule(path)
        kind = onnx.TensorProto.UINT8 if site.quantizer.grid.bits <= 8 else onnx.TensorProto.UINT16
        probed.graph.node.append(onnx.helper.make_node("Cast", [name], [f"{name}_seen"], to=kind))
        probed.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_seen", kind, None))
    return probed.SerializeToString()
