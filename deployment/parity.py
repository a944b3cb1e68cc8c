"""Whether a runtime computes from the exported file what the student computes, tensor by tensor.

Floating point sums differ in their order, integer kernels multiply by other scales: a tensor may be off by one step
where it lay on the edge between two. Such a step would show in all layers behind it, so each tensor is compared on the
runtime's own inputs: the student is run with every quantized tensor replaced by the runtime's. Biases that the file
has in integers are rounded in the student as well: what that costs is the difference between the two students.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from deployment.onnx_export import INPUT, OUTPUT, Exported
from deployment.runtime import require, session
from quantizers.layer import ActivationSite

STEPS = 1  # that a quantized tensor may be off
RELATIVE = 1e-3  # that the float output may be off, of its largest value


class ParityError(RuntimeError):
    """The exported model and the student disagree."""


@dataclass(frozen=True, kw_only=True)
class TensorParity:
    """One tensor on the runtime's own inputs. `steps`: the largest difference, in steps of its grid, or, for the
    float output, in `RELATIVE` of its largest value; `share`: of the elements that differ (of a quantized tensor).
    """

    tensor: str
    steps: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """On labelled images, in per cent: top-1 of the runtime, of the student as it is and of the student with rounded
    biases, and the share of images on which runtime and student with rounded biases predict alike.
    """

    images: int
    top1: float
    student_top1: float
    rounded_top1: float
    agreement: float


class _Compared:
    """Replaces what a site gives by what the runtime gave, and keeps how far the two are apart."""

    def __init__(self, tensor: str, seen: Tensor) -> None:
        self.tensor, self.seen = tensor, seen
        self.rows: list[TensorParity] = []

    def __call__(self, site: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        quantizer = site.quantizer
        q, scale, zero_point = quantizer.integers(inputs[0])
        theirs = self.seen.to(q.device, torch.int32) + quantizer.grid.low
        off = (q - theirs).abs()
        share = float((off > 0).float().mean())
        self.rows.append(TensorParity(tensor=self.tensor, steps=float(off.max()), share=share))
        return (theirs - zero_point) * scale


@torch.no_grad()
def compare(student: fx.GraphModule, exported: Exported, images: Tensor, *, threads: int = 1) -> list[TensorParity]:
    """Compares every quantized tensor and the output, in order of execution.

    Args:
        student: what was exported, on the CPU.
        exported: what `export_onnx` gave.
        images: (N, C, H, W), normalised; others than those of the calibration.
        threads: of the runtime.
    """
    names = list(exported.sites.values())
    run = session(_with_outputs(exported.model, names), threads=threads)
    output, *integers = run.run([OUTPUT, *(f"{name}_seen" for name in names)], {INPUT: images.numpy()})
    theirs = torch.from_numpy(output)
    seen = {path: torch.from_numpy(found.astype("int32")) for path, found in zip(exported.sites, integers, strict=True)}
    tensors = {str(n.target): str(n.meta.get("tensor", n.name)) for n in student.graph.nodes if n.target in seen}
    rounded = with_rounded_biases(student, exported)
    with _on_the_runtimes_inputs(rounded, seen, tensors) as rows:
        ours = rounded(images)
    largest = max(float(ours.abs().max()), 1e-12)
    off = float((ours - theirs).abs().max()) / largest
    if not torch.isfinite(theirs).all():
        off = float("inf")
    return [*rows, TensorParity(tensor=OUTPUT, steps=off / RELATIVE, share=0.0)]


def expect_parity(rows: list[TensorParity]) -> None:
    """Raises `ParityError` naming the first tensor that is off by more than a step."""
    wrong = next((row for row in rows if not row.steps <= STEPS), None)
    if wrong is not None:
        raise ParityError(
            f"export: expected at most {STEPS} step of difference between runtime and student, got {wrong.steps:.3g} "
            f"at {wrong.tensor}, the first tensor that differs ({100 * wrong.share:.2f} % of its elements); a "
            "container without integer kernels (export.container=int4) tells whether it is these"
        )


@torch.no_grad()
def predictions(
    student: fx.GraphModule, exported: Exported, batches: Iterable[tuple[Tensor, Tensor]], *, threads: int = 1
) -> Predictions:
    """Predictions of runtime and student on batches of normalised images (N, C, H, W) and labels (N,)."""
    run = session(exported.model.SerializeToString(), threads=threads)
    rounded = with_rounded_biases(student, exported)
    count, right, alike = 0, [0, 0, 0], 0
    for images, labels in batches:
        theirs = torch.from_numpy(run.run(None, {INPUT: images.numpy()})[0]).argmax(1)
        answers = [theirs, student(images).argmax(1), rounded(images).argmax(1)]
        right = [n + int((answer == labels).sum()) for n, answer in zip(right, answers, strict=True)]
        alike, count = alike + int((answers[0] == answers[2]).sum()), count + len(labels)
    if not count:
        raise ValueError("images: expected at least one labelled image to predict, got none")
    runtime, own, own_rounded, agreement = (100.0 * n / count for n in (*right, alike))
    return Predictions(images=count, top1=runtime, student_top1=own, rounded_top1=own_rounded, agreement=agreement)


def expect_same_top1(found: Predictions, tolerance: float) -> None:
    """Raises `ParityError` where the top-1 of runtime and student (with rounded biases) are apart.

    By more than `tolerance` points, and by more than chance does: a tensor that is a step off changes predictions that
    were near to change, many of them in a network that quantization has broken. Of d changed predictions, as many
    become right as wrong, within 3 sqrt(d).
    """
    off = abs(found.top1 - found.rounded_top1) * found.images / 100
    changed = (100 - found.agreement) * found.images / 100
    if off > max(tolerance * found.images / 100, 3 * math.sqrt(changed)) + 1e-6:
        raise ParityError(
            f"export: expected the student's top-1 on {found.images} images, {found.rounded_top1:.2f}, within "
            f"{tolerance} points, got {found.top1:.2f} from the runtime; they predict alike on {found.agreement:.2f} %"
        )


def with_rounded_biases(student: fx.GraphModule, exported: Exported) -> fx.GraphModule:
    """A copy of the student with the biases that the file has: those in integers rounded."""
    rounded = copy.deepcopy(student)
    for path, bias in exported.biases.items():
        layer: Any = rounded.get_submodule(path)
        layer.layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return rounded


@contextmanager
def _on_the_runtimes_inputs(
    student: fx.GraphModule, seen: dict[str, Tensor], tensors: dict[str, str]
) -> Iterator[list[TensorParity]]:
    rows: list[TensorParity] = []
    handles = []
    for path, found in seen.items():
        site = student.get_submodule(path)
        assert isinstance(site, ActivationSite)
        compared = _Compared(tensors[path], found)
        compared.rows = rows
        handles.append(site.register_forward_hook(compared))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _with_outputs(model: Any, names: list[str]) -> bytes:
    """The model with these integer tensors as further outputs, widened to 8 bits at least."""
    onnx = require("onnx")
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    for name in names:
        node = onnx.helper.make_node("Cast", [name], [f"{name}_seen"], to=onnx.TensorProto.INT32)
        probed.graph.node.append(node)
        probed.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_seen", onnx.TensorProto.INT32, None))
    return probed.SerializeToString()
