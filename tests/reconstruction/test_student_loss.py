"""The divergence is its closed form under both reductions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reconstruction.student_loss import StudentLoss


def logits(classes: int, seed: int) -> Tensor:
    return 5 * torch.randn(6, classes, generator=torch.Generator().manual_seed(seed))


def divergence(teacher: list[float], student: list[float], tau: float) -> float:
    """KL of two softmaxes, in plain floats."""
    p, q = ([math.exp(z / tau) for z in row] for row in (teacher, student))
    return sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("tau", [1.0, 20.0])
def test_closed_form_and_a_factor_of_the_classes_between_the_reductions(classes: int, tau: float) -> None:
    teacher, student = logits(classes, 0), logits(classes, 1)
    labels = torch.full((6, classes), 1 / classes)
    rows = zip(teacher.double().tolist(), student.double().tolist(), strict=True)
    mean = sum(divergence(t, s, tau) for t, s in rows) / 6
    found = {
        kind: float(StudentLoss(tau, divergence=3.0, reduction=kind)(student, teacher, labels)["divergence"])  # type: ignore[arg-type]
        for kind in ("batchmean", "mean")
    }
    assert found["batchmean"] == pytest.approx(3 * tau**2 * mean, rel=1e-3)
    assert found["mean"] == pytest.approx(3 * tau**2 * mean / classes, rel=1e-3)


def test_cross_entropy_takes_mixtures_and_terms_of_weight_zero_are_left_out() -> None:
    student, teacher = logits(4, 0), logits(4, 1)
    labels = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(6, 4)
    terms = StudentLoss(divergence=0.0, cross_entropy=2.0)(student, teacher, labels)
    assert set(terms) == {"cross_entropy"}
    expected = -student.log_softmax(1)[:, :2].mean(1).mean()
    torch.testing.assert_close(terms["cross_entropy"], 2 * expected)
    assert set(StudentLoss(cross_entropy=0.0)(student, teacher, labels)) == {"divergence"}


def test_extreme_logits_are_finite_and_half_precision_is_raised() -> None:
    extreme = torch.tensor([[1e4, -1e4]], dtype=torch.bfloat16, requires_grad=True)
    terms = StudentLoss(1.0)(extreme, -extreme.detach(), torch.tensor([[0.0, 1.0]]))
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert extreme.grad is not None
    assert extreme.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected"),
        ({"divergence": 0.0, "cross_entropy": 0.0}, "one of them positive"),
        ({"reduction": "sum"}, "reduction: expected one of mean, batchmean"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentLoss(**arguments)
