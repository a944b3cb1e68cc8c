"""Terms on outputs, each against its formula written out in numpy or scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cosine, jensenshannon
from scipy.special import log_softmax, softmax
from torch import Tensor

from synthesis.guidance import Answer, Competition, CosineMargin, CrossEntropy, FocalCrossEntropy, SoftProbability

N, K, F_ = 6, 5, 4


@pytest.fixture
def answer() -> Answer:
    rng = torch.Generator().manual_seed(0)
    labels = F.one_hot(torch.randint(K, (N,), generator=rng), K).float()
    logits, student = 3 * torch.randn(2, N, K, generator=rng)
    return Answer(logits, labels, torch.randn(N, F_, generator=rng), student)


def rows(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def test_cross_entropy_of_hard_and_soft_labels(answer: Answer) -> None:
    hard = F.cross_entropy(answer.logits, answer.labels.argmax(1))
    torch.testing.assert_close(CrossEntropy(2.0)(answer), 2 * hard)
    soft = answer._replace(labels=torch.full((N, K), 1 / K))
    expected = -log_softmax(rows(answer.logits), 1).mean()
    assert float(CrossEntropy(1.0)(soft)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_weighs_by_the_distance_from_certainty(answer: Answer, gamma: float) -> None:
    chosen = answer.labels.argmax(1).numpy()
    p = softmax(rows(answer.logits), 1)[np.arange(N), chosen]
    expected = 0.1 * np.mean((1 - p) ** gamma * -np.log(p))
    assert float(FocalCrossEntropy(0.1, gamma)(answer)) == pytest.approx(expected, rel=1e-4)


def test_focal_has_a_finite_gradient_where_the_teacher_is_certain(answer: Answer) -> None:
    logits = (1e3 * answer.labels).requires_grad_()
    FocalCrossEntropy(1.0, 0.5)(answer._replace(logits=logits)).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_soft_probability_is_the_squared_distance_of_the_probability(answer: Answer) -> None:
    chosen = answer.labels.argmax(1).numpy()
    p = softmax(rows(answer.logits), 1)[np.arange(N), chosen]
    assert float(SoftProbability(1.0, 0.95)(answer)) == pytest.approx(np.mean((p - 0.95) ** 2), rel=1e-5)


def test_margin_against_a_loop_over_samples(answer: Answer) -> None:
    term = CosineMargin(1.0, lower=0.4, upper=0.9)
    term.bind(K, F_)
    assert float(term(answer)) == 0  # nothing finished yet
    finished = answer._replace(features=torch.randn(N, F_, generator=torch.Generator().manual_seed(1)))
    term.remember(finished)
    term.remember(answer)
    kept: dict[int, list[np.ndarray]] = {}
    for past in (finished, answer):
        assert past.features is not None
        for label, feature in zip(past.labels.argmax(1).tolist(), rows(past.features), strict=True):
            kept.setdefault(label, []).append(feature)
    now = answer._replace(labels=answer.labels.roll(1, 0))
    assert now.features is not None
    expected = 0.0
    for label, feature in zip(now.labels.argmax(1).tolist(), rows(now.features), strict=True):
        if label in kept:
            d = cosine(feature, np.mean(kept[label], axis=0))
            expected += max(0.4 - d, 0) + max(d - 0.9, 0)
    assert float(term(now)) == pytest.approx(expected / N, rel=1e-5)
    term.forget()
    assert float(term(now)) == 0


def test_margin_that_is_off_costs_nothing(answer: Answer) -> None:
    term = CosineMargin(1.0, lower=0.0, upper=2.0)
    term.bind(K, F_)
    term.remember(answer)
    assert float(term(answer)) == pytest.approx(0, abs=1e-6)
    assert float(term(answer._replace(features=None))) == 0
    assert not term.uses_features
    assert not term.uses_earlier
    for lower, upper in ((0.0, 1.0), (0.1, 2.0)):
        half = CosineMargin(1.0, lower=lower, upper=upper)
        assert half.uses_features
        assert half.uses_earlier


def test_competition_is_one_minus_the_jensen_shannon_divergence(answer: Answer) -> None:
    assert answer.student is not None
    p, q = softmax(rows(answer.logits) / 3, 1), softmax(rows(answer.student) / 3, 1)
    divergence = np.mean([jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)])
    assert float(Competition(0.2)(answer)) == pytest.approx(0.2 * (1 - divergence), rel=1e-5)
    same = answer._replace(student=answer.logits)
    assert float(Competition(1.0)(same)) == pytest.approx(1, abs=1e-6)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"guidance\.target"):
        SoftProbability(1.0, 0.0)
    with pytest.raises(ValueError, match=r"guidance\.lower"):
        CosineMargin(1.0, lower=0.9, upper=0.1)
    with pytest.raises(ValueError, match=r"guidance\.temperature"):
        Competition(1.0, 0.0)
