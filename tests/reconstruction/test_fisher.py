from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reconstruction.fisher import DiagonalFisher, output_gradients
from reconstruction.memory import estimate_bytes
from reconstruction.objectives import PowerError
from tests.reconstruction.students import Skip, skip_at

FISHER = DiagonalFisher()
ALL = torch.arange(10)


def explicit_gradients(student: Any, reference: Any, x: Tensor, parallel: bool) -> tuple[Tensor, Tensor]:
    """z of the second layer and dL/dz there, written out: quantized in front, float behind."""
    first, second = student.first, student.second
    with torch.no_grad():
        a = student.activation_sites.relu(F.linear(x, first.quantized_weight(), first.bias).relu())
        a = F.linear(x, reference.first.weight, reference.first.bias).relu() if parallel else a
        z = F.linear(a, second.quantized_weight(), second.bias).relu()
    z.requires_grad_()
    logits = F.linear(z + a, reference.third.weight, reference.third.bias)
    with torch.no_grad():
        p = reference(x).softmax(1)
    loss = (p * (p.log() - logits.log_softmax(1))).sum()
    (g,) = torch.autograd.grad(loss, z)
    return z.detach(), g


@pytest.mark.parametrize("parallel", [False, True])
def test_weights_are_the_squared_gradients_of_an_explicit_network(parallel: bool) -> None:
    conversion, cache = skip_at(1, parallel=parallel)
    z, g = explicit_gradients(conversion.student, conversion.reference, cache.images, parallel)
    FISHER.enter(cache, ALL)
    torch.testing.assert_close(cache.weights[0], g.square() / g.square().mean(), rtol=1e-3, atol=1e-5)
    expected = (cache.weights[0] * (z - cache.target).square()).sum(1)
    torch.testing.assert_close(FISHER.errors(cache, [z], slice(0, 10)), expected)
    some = torch.tensor([7, 2, 7])
    torch.testing.assert_close(FISHER.errors(cache, [z[some]], some), expected[some])


def test_the_error_changes_when_the_gradients_change_places() -> None:
    _, cache = skip_at(1)
    FISHER.enter(cache, ALL)
    (z,) = cache.student_module(*cache.student_inputs)
    before = FISHER.errors(cache, [z], ALL)
    cache.weights = [cache.weights[0].roll(1, dims=1)]
    assert not torch.allclose(FISHER.errors(cache, [z], ALL), before, rtol=0.05)
    cache.weights = [torch.ones_like(z)]
    assert torch.equal(FISHER.errors(cache, [z], ALL), PowerError().errors(cache, [z], ALL))


def test_gradients_are_the_fisher_matrix_times_the_error_where_that_is_small() -> None:
    """Closed form: behind z stands softmax(V z + b), whose Fisher matrix is V' (diag(p) - p p') V."""
    conversion, cache = skip_at(3, network=Skip().eval(), bits=(8, 8))  # the classifier: softmax of z itself
    (z,) = cache.student_module(*cache.student_inputs)
    p, q = cache.logits.softmax(1), z.softmax(1)
    (g,) = output_gradients(cache, slice(0, 10))
    torch.testing.assert_close(g, (q - p).detach(), rtol=1e-3, atol=1e-7)

    conversion, cache = skip_at(2, bits=(8, 8))  # in front of the classifier
    V = conversion.reference.third.weight
    (z,) = cache.student_module(*cache.student_inputs)
    delta = (z - cache.target).detach()
    p = cache.logits.softmax(1)
    fisher = torch.einsum("ci,nc,cj->nij", V, p, V) - torch.einsum("ni,nj->nij", p @ V, p @ V)
    closed = torch.einsum("nij,nj->ni", fisher, delta)
    (g,) = output_gradients(cache, slice(0, 10))
    torch.testing.assert_close(g, closed, rtol=0.05, atol=0.05 * float(closed.abs().max()))


def test_the_mean_weight_is_one_over_the_images_that_are_learned_from() -> None:
    kept = torch.tensor([0, 3, 4, 8])
    _, cache = skip_at(1)
    FISHER.enter(cache, kept)
    assert float(cache.weights[0][kept].mean()) == pytest.approx(1.0, rel=1e-5)
    assert float(cache.weights[0].mean()) != pytest.approx(1.0, rel=1e-3)
    assert float(cache.weights[0].min()) < 0.5  # nothing is added to |g|


def test_batches_and_residencies_give_the_same_weights() -> None:
    found = []
    for arguments in ({"batch_size": 10}, {"batch_size": 3}, {"residency": "disk"}, {"residency": "half"}):
        _, cache = skip_at(1, **arguments)
        FISHER.enter(cache, ALL)
        found.append(cache.weights[0].clone())
    for weights in found[1:]:
        torch.testing.assert_close(weights, found[0], rtol=0.05, atol=1e-3)


def test_weights_go_with_their_unit_and_are_counted() -> None:
    _, cache = skip_at(1, weighted=True)
    reference = cache.cutters["teacher"].graph_module
    FISHER.enter(cache, ALL)
    cache.enter(2)
    assert cache.weights == []
    plain = estimate_bytes(reference, cache.units, 10)
    assert cache.bytes_expected > plain
    assert estimate_bytes(reference, cache.units, 10, parallel=True) < plain


@pytest.mark.parametrize("count", [1, 10])
def test_a_unit_that_the_logits_do_not_feel_is_learned_by_the_squared_error(
    count: int, caplog: pytest.LogCaptureFixture
) -> None:
    network = Skip().eval()
    nn.init.zeros_(network.third.weight)
    _, cache = skip_at(1, network=network, count=count)
    with caplog.at_level(logging.WARNING):
        FISHER.enter(cache, torch.arange(count))
    assert "do not depend" in caplog.text
    assert bool((cache.weights[0] == 1).all())


def test_a_single_image_has_finite_weights() -> None:
    _, cache = skip_at(1, count=1)
    FISHER.enter(cache, torch.tensor([0]))
    assert bool(cache.weights[0].isfinite().all())
    assert float(cache.weights[0].mean()) == pytest.approx(1.0, rel=1e-5)
