"""Criteria against their formula written out; hinge and enhancement against the bugs of the published code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synthesis.criteria import (
    Criterion,
    FirstLayer,
    LayerwiseEnhancement,
    Norm,
    NormalDivergence,
    NormalizedDistance,
    SquaredL2,
    Uniform,
)
from synthesis.moments import Statistics

SIZES = (3, 5)
SEGMENTS = torch.block_diag(*(torch.ones(size, 1) for size in SIZES))
CPU = torch.device("cpu")


def draw(rng: torch.Generator, *shape: int) -> Statistics:
    return Statistics(torch.randn(*shape, generator=rng), torch.rand(*shape, generator=rng))


@pytest.mark.parametrize("channels", ["sum", "mean"])
def test_formula(channels: str) -> None:
    rng = torch.Generator().manual_seed(0)
    seen, target = draw(rng, 4, 8), draw(rng, 8)
    slack = Statistics(torch.rand(8, generator=rng), torch.rand(8, generator=rng))
    losses = SquaredL2(channels)(seen, target, slack, SEGMENTS)  # type: ignore[arg-type]
    for sample in range(4):
        for layer, columns in enumerate((slice(0, 3), slice(3, 8))):
            expected = 0.0
            for a, b, d in zip(seen, target, slack, strict=True):
                hinge = ((a[sample, columns] - b[columns]).abs() - d[columns]).clamp(min=0)
                expected += (hinge**2).sum().item() / (1 if channels == "sum" else SIZES[layer])
            assert (losses[sample, layer]).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_loss_and_gradient_are_exactly_zero_inside_the_slack(seed: int, share: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    target, slack = draw(rng, 8), Statistics(torch.rand(8, generator=rng), torch.rand(8, generator=rng))
    sign = torch.randint(0, 2, (2, 1, 8), generator=rng) * 2 - 1
    seen = Statistics(*((t + s * share * (1 - 1e-3) * d - 0 * s) for t, s, d in zip(target, sign, slack, strict=True)))
    # rounding of target + gap - target may leave the slack by an ulp of the target
    inside = Statistics(*(torch.maximum(d, (a - t).abs()[0]) for a, t, d in zip(seen, target, slack, strict=True)))
    seen = Statistics(*(part.requires_grad_() for part in seen))
    loss = SquaredL2()(seen, target, inside, SEGMENTS).sum()
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, list(seen)):
        assert gradient.abs().max().item() == 0


def test_loss_is_positive_outside_the_slack() -> None:
    target = Statistics(torch.zeros(8), torch.ones(8))
    slack = Statistics(torch.full((8,), 0.5), torch.full((8,), 0.5))
    for gap in (-0.6, 0.6):
        seen = Statistics(target.mean[None] + gap, target.spread[None])
        torch.testing.assert_close(SquaredL2()(seen, target, slack, SEGMENTS), torch.tensor([[0.03, 0.05]]))


def test_uniform_weights() -> None:
    assert Uniform()(4, 5, "batch", CPU).tolist() == [[1.0] * 5]
    assert Uniform("mean")(4, 5, "batch", CPU).sum() == pytest.approx(1)


def test_enhancement_weighs_layer_i_of_sample_i_twice_and_all_else_once() -> None:
    losses = torch.rand(4, 4, requires_grad=True)

    def gradient(weights: Tensor) -> Tensor:
        return torch.autograd.grad((weights * losses).sum(1).mean(), losses)[0]

    ratio = gradient(LayerwiseEnhancement()(4, 4, "sample", CPU)) / gradient(Uniform()(4, 4, "sample", CPU))
    assert torch.equal(ratio, 1 + torch.eye(4))


def test_enhancement_refuses_pooled_statistics_and_other_batch_sizes() -> None:
    with pytest.raises(ValueError, match=r"reduction: .* expects 'sample', got 'batch'"):
        LayerwiseEnhancement()(4, 4, "batch", CPU)
    with pytest.raises(ValueError, match=r"batch_size: .* \(4\), got 5"):
        LayerwiseEnhancement()(5, 4, "sample", CPU)


def test_misspelt_options_are_refused() -> None:
    with pytest.raises(ValueError, match="channels"):
        SquaredL2("max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers"):
        Uniform("max")  # type: ignore[arg-type]


def by_layer(part: Statistics, sample: int | None = None) -> list[tuple[Tensor, Tensor]]:
    mean, spread = part if sample is None else (part.mean[sample], part.spread[sample])
    return list(zip(mean.split(SIZES), spread.split(SIZES), strict=True))


NO_SLACK = Statistics(torch.zeros(8), torch.zeros(8))


def test_norm_is_not_squared_and_keeps_its_gradient_near_the_target() -> None:
    rng = torch.Generator().manual_seed(1)
    seen, target = draw(rng, 2, 8), draw(rng, 8)
    losses = Norm()(seen, target, NO_SLACK, SEGMENTS)
    for sample in range(2):
        for layer, ((m, s), (mu, sigma)) in enumerate(zip(by_layer(seen, sample), by_layer(target), strict=True)):
            torch.testing.assert_close(losses[sample, layer], (m - mu).norm() + (s - sigma).norm())
    near = Statistics((target.mean + 1e-4).unsqueeze(0).requires_grad_(), target.spread.unsqueeze(0))
    (gradient,) = torch.autograd.grad(Norm()(near, target, NO_SLACK, SEGMENTS).sum(), near.mean)
    torch.testing.assert_close(gradient[0, :3].norm(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_normalized_distance_and_what_it_ignores() -> None:
    rng = torch.Generator().manual_seed(2)
    seen, target = draw(rng, 2, 8), draw(rng, 8)
    losses = NormalizedDistance()(seen, target, NO_SLACK, SEGMENTS)
    for sample in range(2):
        for layer, ((m, s), (mu, sigma)) in enumerate(zip(by_layer(seen, sample), by_layer(target), strict=True)):
            expected = ((m - mu) / ((s + 1e-6) ** 2 + (sigma + 1e-6) ** 2).sqrt()).norm()
            torch.testing.assert_close(losses[sample, layer], expected)
    same_means = Statistics(target.mean.unsqueeze(0), 7 * target.spread.unsqueeze(0))
    assert NormalizedDistance()(same_means, target, NO_SLACK, SEGMENTS).sum() == 0


def test_normal_divergence_against_torch_distributions() -> None:
    rng = torch.Generator().manual_seed(3)
    seen, target = draw(rng, 2, 8), draw(rng, 8)
    losses = NormalDivergence()(seen, target, NO_SLACK, SEGMENTS)
    for sample in range(2):
        for layer, (ours, theirs) in enumerate(zip(by_layer(seen, sample), by_layer(target), strict=True)):
            p, q = (torch.distributions.Normal(m, s + 1e-12) for m, s in (ours, theirs))
            expected = torch.distributions.kl_divergence(p, q).sum()
            torch.testing.assert_close(losses[sample, layer], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", [SquaredL2(), Norm(), NormalizedDistance(), NormalDivergence()])
def test_finite_gradient_at_the_target(criterion: Criterion) -> None:
    target = Statistics(torch.zeros(8), torch.ones(8))
    seen = Statistics(*(part.unsqueeze(0).clone().requires_grad_() for part in target))
    loss = criterion(seen, target, NO_SLACK, SEGMENTS).sum()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(loss, list(seen), allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


def test_first_layer_counts_more() -> None:
    torch.testing.assert_close(FirstLayer(10, weight=0.01)(5, 3, "batch", CPU), torch.tensor([[0.1, 0.01, 0.01]]))
    torch.testing.assert_close(Uniform("mean", weight=0.3)(5, 3, "batch", CPU), torch.full((1, 3), 0.1))
