"""How often runtime and student are right, each computing by itself: a report, where `parity` is the proof.

A tie that is decided otherwise spreads, and changes predictions that were near to change: in deep networks, and in
those that quantization has broken, many of them, and as many become right as wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deployment.onnx_export import INPUT, Exported
from deployment.parity import ParityError, with_rounded_biases
from deployment.runtime import Loaded, Runtime, load


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
    runtimes: Sequence[Runtime] = ("onnxruntime",),
) -> dict[Runtime, Predictions]:
    """Predictions of each runtime and of the student on batches of normalised images (N, C, H, W) and labels (N,)."""
    model = exported.model.SerializeToString()
    loaded: dict[Runtime, Loaded] = {runtime: load(model, runtime, threads=threads) for runtime in runtimes}
    rounded = with_rounded_biases(student, exported)
    right: dict[str, int] = dict.fromkeys(("student", "rounded", *runtimes), 0)
    alike: dict[Runtime, int] = dict.fromkeys(runtimes, 0)
    count = 0
    for images, labels in batches:
        answers = {"student": student(images).argmax(1), "rounded": rounded(images).argmax(1)}
        for runtime, run in loaded.items():
            answers[runtime] = torch.from_numpy(run.run(None, {INPUT: images.numpy()})[0]).argmax(1)
            alike[runtime] += int((answers[runtime] == answers["rounded"]).sum())
        for name, answer in answers.items():
            right[name] += int((answer == labels).sum())
        count += len(labels)
    if not count:
        raise ValueError("images: expected at least one labelled image to predict, got none")
    own, own_rounded = (100.0 * right[name] / count for name in ("student", "rounded"))
    return {
        runtime: Predictions(
            images=count,
            top1=100.0 * right[runtime] / count,
            student_top1=own,
            rounded_top1=own_rounded,
            agreement=100.0 * alike[runtime] / count,
        )
        for runtime in runtimes
    }


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
