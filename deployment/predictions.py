"""How often runtime and student are right, each computing by itself: a report, where `parity` is the proof.

A tie that is decided otherwise spreads, and changes predictions that were near to change: in deep networks, and in
those that quantization has broken, many of them, and as many become right as wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deployment.onnx_export import INPUT, Exported
from deployment.parity import ParityError, with_rounded_biases
from deployment.runtime import Runtime, load


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


@torch.no_grad()
def predictions(
    student: fx.GraphModule,
    exported: Exported,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    threads: int = 1,
    runtime: Runtime = "onnxruntime",
) -> Predictions:
    """Predictions of runtime and student on batches of normalised images (N, C, H, W) and labels (N,)."""
    run = load(exported.model.SerializeToString(), runtime, threads=threads)
    rounded = with_rounded_biases(student, exported)
    count, right, alike = 0, [0, 0, 0], 0
    for images, labels in batches:
        theirs = torch.from_numpy(run.run(None, {INPUT: images.numpy()})[0]).argmax(1)
        answers = [theirs, student(images).argmax(1), rounded(images).argmax(1)]
        right = [n + int((answer == labels).sum()) for n, answer in zip(right, answers, strict=True)]
        alike, count = alike + int((answers[0] == answers[2]).sum()), count + len(labels)
    if not count:
        raise ValueError("images: expected at least one labelled image to predict, got none")
    top1, own, own_rounded, agreement = (100.0 * n / count for n in (*right, alike))
    return Predictions(images=count, top1=top1, student_top1=own, rounded_top1=own_rounded, agreement=agreement)


def expect_same_top1(found: Predictions, tolerance: float | None) -> None:
    """Raises `ParityError` where top-1 of runtime and student (with rounded biases) are more than `tolerance` points
    apart; None allows any difference.
    """
    if tolerance is not None and abs(found.top1 - found.rounded_top1) > tolerance + 1e-6:
        raise ParityError(
            f"export.tolerance: expected the student's top-1 on {found.images} images, {found.rounded_top1:.2f}, "
            f"within {tolerance} points, got {found.top1:.2f} from the runtime; they predict alike on "
            f"{found.agreement:.2f} %; export.tolerance=null only reports it"
        )
