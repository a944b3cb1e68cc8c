"""Criteria against their formula written out; hinge and enhancement against the bugs of the published code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from synthesis.criteria import LayerwiseEnhancement, SquaredL2, Uniform
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
