"""Moments against `torch.var_mean` and against what BatchNorm itself computes in training mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from synthesis.moments import Moments, Probe, merge, moments

SHAPES = [(4, 3, 5, 6), (4, 3), (1, 3, 2, 2), (3, 2, 4), (2, 3, 2, 2, 2)]


def axes(shape: tuple[int, ...], reduction: str) -> tuple[int, ...]:
    rest = tuple(range(2, len(shape)))
    return rest if reduction == "sample" else (0, *rest)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("reduction", ["sample", "batch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient_agree_with_var_mean(shape: tuple[int, ...], reduction: str, unbiased: bool) -> None:
    if len(shape) == 2 and reduction == "sample":
        return  # torch.var_mean reads no axes as all axes
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours = moments(x, reduction, unbiased)  # type: ignore[arg-type]
    var, mean = torch.var_mean(x, axes(shape, reduction), correction=int(unbiased))
    torch.testing.assert_close(ours.mean, mean)
    torch.testing.assert_close(ours.var, var)
    weights = torch.randn(2, *mean.shape, dtype=torch.float64)
    got = torch.autograd.grad((weights[0] * ours.mean + weights[1] * ours.var.sqrt()).sum(), x)
    expected = torch.autograd.grad((weights[0] * mean + weights[1] * var.sqrt()).sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_gradcheck(reduction: str) -> None:
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(moments(x, reduction, True)), x)  # type: ignore[arg-type]


def test_agrees_with_batch_norm_in_training_mode() -> None:
    x = 3 * torch.randn(8, 5, 7, 7) + torch.arange(5.0).view(5, 1, 1)
    mean, var = torch.zeros(5), torch.zeros(5)
    F.batch_norm(x, mean, var, training=True, momentum=1.0)  # stores the batch mean and the unbiased variance
    ours = moments(x, "batch", unbiased=True)
    torch.testing.assert_close(ours.mean, mean)
    torch.testing.assert_close(ours.var, var)


def test_variance_survives_a_large_mean() -> None:
    x = 1000 + torch.randn(4, 2, 16, 16)
    torch.testing.assert_close(moments(x).var, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("x", [torch.randn(2, 3, 1, 1), torch.ones(2, 3, 4, 4), torch.randn(1, 3, 1, 1)])
def test_single_positions_and_constants_stay_finite(x: torch.Tensor, unbiased: bool) -> None:
    x = x.clone().requires_grad_()
    probe = Probe("sample", unbiased=unbiased)
    seen = probe.statistics(probe.measure(x))
    (gradient,) = torch.autograd.grad(seen.spread.sum() + seen.mean.sum(), x)
    assert seen.spread.isfinite().all()
    assert gradient.isfinite().all()


def test_channels_last_and_half_precision_agree() -> None:
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(moments(x.to(memory_format=torch.channels_last)), moments(x))
    half = moments(x.bfloat16())
    assert half.var.dtype == torch.float32
    torch.testing.assert_close(half, moments(x), rtol=0.05, atol=0.02)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))
def test_merge_equals_the_moments_of_everything(sizes: list[int], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, 4, 4, generator=rng, dtype=torch.float64) * n + n for n in sizes]
    merged = merge([moments(part) for part in parts], sizes)
    torch.testing.assert_close(merged, moments(torch.cat(parts)))


def test_merge_ignores_an_empty_set() -> None:
    part = moments(torch.randn(2, 3, 4, 4))
    nothing = Moments(torch.zeros(3), torch.zeros(3))
    torch.testing.assert_close(merge([part, nothing], [2, torch.zeros(())]), part)


@pytest.mark.parametrize(
    "wrong", [{"reduction": "image"}, {"moment": "mad"}, {"eps": 0.0}, {"reduction": "all", "unbiased": True}]
)
def test_probe_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Probe(**wrong)  # type: ignore[arg-type]
