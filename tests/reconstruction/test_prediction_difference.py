from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantizers.fold import fold
from reconstruction.activations import ActivationCache
from reconstruction.fisher import DiagonalFisher
from reconstruction.objectives import Objective, PowerError
from reconstruction.partition import partition
from reconstruction.prediction_difference import PredictionDifference
from reconstruction.tail import divergence
from tests.reconstruction.students import Skip, skip_at, vectors


@pytest.mark.parametrize("parallel", [False, True])
def test_equals_an_explicit_network_and_torchs_divergence(parallel: bool) -> None:
    conversion, cache = skip_at(1, parallel=parallel)
    index = torch.tensor([3, 9, 3])
    x, third = cache.images[index], conversion.reference.third
    with torch.no_grad():
        first = conversion.reference.first if parallel else conversion.student.first
        a = first(x).relu()
        a = a if parallel else conversion.student.activation_sites.relu(a)
        z = conversion.student.second(a).relu()
        target = conversion.reference.first(x).relu()
        target = conversion.reference.second(target).relu()
        float_logits = conversion.reference(x)
    z.requires_grad_()
    difference = F.kl_div((third(z + a) / 4).log_softmax(1), (float_logits / 4).softmax(1), reduction="batchmean")
    expected = (z - target).square().sum(1).mean() + 10 * difference
    (outputs,) = cache.student_module(*cache.pick(cache.student_inputs, index))
    torch.testing.assert_close(outputs, z)
    outputs = outputs.detach().requires_grad_()
    error = PredictionDifference().errors(cache, [outputs], index).mean()
    torch.testing.assert_close(error, expected)
    gradients = [torch.autograd.grad(loss, at)[0] for loss, at in ((error, outputs), (expected, z))]
    torch.testing.assert_close(*gradients)
    assert not any(p.requires_grad for p in conversion.reference.parameters())


def test_the_last_unit_has_no_tail() -> None:
    _, cache = skip_at(3)
    y = torch.randn(10, 5)
    p, q = (cache.logits / 4).log_softmax(1), (y / 4).log_softmax(1)
    expected = (y - cache.target).square().sum(1) + 10 * (p.exp() * (p - q)).sum(1)
    torch.testing.assert_close(PredictionDifference().errors(cache, [y], torch.arange(10)), expected)


def test_float_outputs_have_no_error_and_weight_zero_is_the_units_error() -> None:
    for index in range(4):
        _, cache = skip_at(index, parallel=True)
        error = PredictionDifference().errors(cache, [cache.target], slice(0, 10))
        torch.testing.assert_close(error, torch.zeros(10), atol=1e-5, rtol=0)
    _, cache = skip_at(1)
    y = torch.randn(10, 8)
    some = torch.tensor([1, 4])
    plain = PowerError(2.4).errors(cache, [y[some]], some)
    assert torch.equal(PredictionDifference(0.0, error=PowerError(2.4)).errors(cache, [y[some]], some), plain)


def test_logits_are_computed_once_and_kept_over_units(monkeypatch: pytest.MonkeyPatch) -> None:
    conversion, cache = skip_at(0)
    before = cache.logits
    torch.testing.assert_close(before, conversion.reference(cache.images))
    monkeypatch.setattr(cache, "_compute_logits", lambda: pytest.fail("computed again"))
    cache.enter(3)
    cache.enter(1, version=1)
    assert cache.logits is before


def test_it_takes_over_the_needs_of_its_error() -> None:
    objective: Objective = PredictionDifference(error=DiagonalFisher())
    assert objective.weighted
    assert not PredictionDifference().weighted
    _, cache = skip_at(1)
    objective.enter(cache, torch.arange(10))
    y = torch.randn(10, 8)
    plain = PredictionDifference().errors(cache, [y], slice(0, 10))
    assert not torch.allclose(objective.errors(cache, [y], slice(0, 10)), plain)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
def test_divergence_is_torchs_own(shape: tuple[int, ...]) -> None:
    t, y = 5 * torch.randn(shape), 5 * torch.randn(shape)
    reference = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=(t / 2).movedim(1, -1)),
        torch.distributions.Categorical(logits=(y / 2).movedim(1, -1)),
    )
    expected = reference.flatten(1).mean(1) if reference.dim() > 1 else reference
    torch.testing.assert_close(divergence(t, y, 2.0), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert divergence(t.bfloat16(), y.bfloat16()).dtype == torch.float32


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y.relu()


def test_what_has_no_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        PredictionDifference(-1.0)
    with pytest.raises(ValueError, match="temperature"):
        PredictionDifference(temperature=0.0)
    _, cache = skip_at(1, network=Skip(classes=1).eval())
    with pytest.raises(ValueError, match="two classes"):
        PredictionDifference().errors(cache, [torch.zeros(10, 8)], slice(0, 10))
    network = fold(_Two().eval(), vectors(1)).graph_module
    cache = ActivationCache(network, network, units=partition(network, "layer"), images=vectors(3))
    cache.enter(0)
    with pytest.raises(ValueError, match="one tensor"):
        PredictionDifference().errors(cache, [torch.zeros(3, 3)], slice(0, 3))
