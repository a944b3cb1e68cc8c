"""SignRound's forward and gradients against the paper's formula written out, and its steps against sign SGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantizers.nearest import Nearest
from quantizers.ranges import LpSearch, MinMax
from quantizers.signround import SignRound
from reconstruction.learnables import learnables_of
from reconstruction.optimizer import adam_for_all
from reconstruction.partition import partition
from reconstruction.schedules import Epoch
from tests.reconstruction.students import images, resnet8, student_of


def a_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def displaced(weight: Tensor, **options: Any) -> SignRound:
    """A quantizer somewhere in the middle of learning."""
    quantizer = SignRound(weight, options.pop("bits", 3), range=MinMax(), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        quantizer.V.uniform_(-0.5, 0.5, generator=generator)
        for end in (quantizer.alpha, quantizer.beta):
            if end is not None:
                end.uniform_(0.5, 1.0, generator=generator)
    return quantizer


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("range", [MinMax(), LpSearch(steps=20)])
def test_the_first_step_is_rounding_to_nearest(symmetric: bool, range: MinMax | LpSearch) -> None:
    weight = a_weight(6, 4, 3, 3)
    ours, nearest = (kind(weight, 3, symmetric=symmetric, range=range) for kind in (SignRound, Nearest))
    assert torch.equal(ours(weight), nearest(weight))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradients_are_those_of_the_papers_formula(bits: int) -> None:
    weight = a_weight(5, 12)
    quantizer = displaced(weight, bits=bits)
    assert quantizer.beta is not None
    V, alpha, beta = (p.detach().double().requires_grad_() for p in (quantizer.V, quantizer.alpha, quantizer.beta))
    # The clip range of the paper, with the ends that the first scale and zero point stand for.
    levels, scale = 2**bits - 1, quantizer.scale.double()
    low, high = -quantizer.zero_point * scale, (levels - quantizer.zero_point) * scale
    s = (high * alpha - low * beta) / levels
    z = Straight.apply(-low * beta / s)
    q = Straight.apply(weight.double() / s + z + V)  # type: ignore[operator]
    expected = s * (torch.maximum(torch.minimum(q, torch.tensor(levels)), torch.tensor(0)) - z)  # type: ignore[operator]
    torch.testing.assert_close(quantizer(weight), expected.float())
    upstream = a_weight(5, 12, seed=2)
    strictly = ((q > 0) & (q < levels)).double()  # at the ends torch.maximum halves gradients
    ours = torch.autograd.grad(
        quantizer(weight), (quantizer.V, quantizer.alpha, quantizer.beta), upstream * strictly.float()
    )
    theirs = torch.autograd.grad(expected, (V, alpha, beta), upstream.double() * strictly)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_clipped_weights_move_the_end_that_they_stand_at() -> None:
    weight = torch.tensor([[-1.0, -0.9, 0.1, 0.4, 2.0, 1.9]])
    quantizer = SignRound(weight, 4, range=MinMax())
    assert quantizer.beta is not None
    with torch.no_grad():
        quantizer.alpha.fill_(0.5)
    (-quantizer(weight)[0, 4]).backward()
    assert quantizer.alpha.grad is not None
    assert float(quantizer.alpha.grad) < 0  # a larger alpha lets the largest weight grow


@pytest.mark.parametrize("symmetric", [False, True])
def test_ends_of_the_range_learn_from_the_first_step(symmetric: bool) -> None:
    """They start on the bound that they are projected onto."""
    weight = a_weight(8, 30)
    quantizer = SignRound(weight, 3, symmetric=symmetric, range=MinMax())
    quantizer(weight).square().sum().backward()
    for end in (quantizer.alpha, quantizer.beta):
        if end is not None:
            assert end.grad is not None
            assert bool((end.grad != 0).any())


def test_shift_at_its_bound_can_return() -> None:
    weight = a_weight(8, 30)
    quantizer = SignRound(weight, 4, range=MinMax())
    with torch.no_grad():
        quantizer.V.fill_(0.5)
    quantizer(weight).sum().backward()
    assert quantizer.V.grad is not None
    assert float((quantizer.V.grad != 0).float().mean()) > 0.5


def test_weights_move_by_at_most_one_step() -> None:
    weight = a_weight(8, 30)
    quantizer = displaced(weight, bits=8)
    with torch.no_grad():
        quantizer.alpha.fill_(1.0)
        quantizer.beta.fill_(1.0)  # type: ignore[union-attr]
        quantizer.V.mul_(100.0)  # forward clips what nobody has projected
        steps = quantizer.multiples(weight) - weight / quantizer.scale
    assert 0.9 < float(steps.abs().max()) <= 1 + 1e-5


@pytest.mark.parametrize("symmetric", [False, True])
def test_hardening_changes_no_number(symmetric: bool) -> None:
    weight = a_weight(6, 20)
    quantizer = displaced(weight, symmetric=symmetric)
    soft = quantizer(weight).detach().clone()
    quantizer.harden()
    assert torch.equal(quantizer(weight), soft)
    assert torch.equal(quantizer.zero_point, quantizer.zero_point.round())


def test_a_step_of_the_one_adam_is_a_projected_step_of_sign_sgd() -> None:
    def build() -> Any:
        conversion = student_of(
            resnet8(), images(8), weight=lambda w, bits: SignRound(w, bits, range=MinMax(), clip_lr=0.02)
        )
        return learnables_of(conversion.student, partition(conversion.reference, "block"))

    units, steps = build(), 5
    epochs = [Epoch("joint", 1, steps)]
    optimizer, schedule = adam_for_all(epochs, units, rates_stated_for=100)  # which SignRound's rates are not
    quantizer = units[1].weight_quantizers[0]
    V, alpha = quantizer.V.detach().clone(), quantizer.alpha.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for t in range(steps):
        magnitudes = 10.0 ** torch.randint(-6, 5, V.shape, generator=generator)
        gradients = [
            magnitudes * torch.randn(V.shape, generator=generator),
            torch.randn(alpha.shape, generator=generator),
        ]
        quantizer.V.grad, quantizer.alpha.grad = (g.clone() for g in gradients)
        optimizer.step()
        schedule.step()
        V = (V - 1 / 5 * (1 - t / steps) * gradients[0].sign()).clamp(-0.5, 0.5)
        alpha = (alpha - 0.02 / 5 * (1 - t / steps) * gradients[1].sign()).clamp(1e-3, 1.0)
        torch.testing.assert_close(quantizer.V.detach(), V, rtol=0, atol=1e-5)
        torch.testing.assert_close(quantizer.alpha.detach(), alpha)
    assert float(quantizer.V.detach().abs().max()) == 0.5


@pytest.mark.parametrize("gradient", [0.0, 1e-45, 1e-38, 1e-23, 1e-20, 1e-19, 1e-15, 1e15])
def test_no_gradient_however_small_moves_further_than_a_sign(gradient: float) -> None:
    quantizer = SignRound(a_weight(2, 3), 4, range=MinMax())
    group = {key: value for key, value in quantizer.parameter_groups()[0].items() if key in ("params", "betas", "eps")}
    optimizer = torch.optim.Adam([group], lr=0.01)
    quantizer.V.grad = torch.full_like(quantizer.V, gradient)
    optimizer.step()
    assert float(quantizer.V.detach().abs().max()) <= 0.01 * (1 + 1e-6)
    assert bool(torch.isfinite(quantizer.V).all())


def test_learning_reduces_the_error_of_a_layer() -> None:
    weight, x = a_weight(8, 64), (a_weight(400, 16, seed=3) @ a_weight(16, 64, seed=4)).relu()
    quantizer = SignRound(weight, 3, range=MinMax())
    steps = [
        torch.optim.Adam([{k: v for k, v in group.items() if k != "anneal"}]) for group in quantizer.parameter_groups()
    ]
    target = x @ weight.T
    entry = torch.inf
    for step in range(201):
        error = (x @ quantizer(weight).T - target).square().mean()
        entry = error.item() if step == 0 else entry
        quantizer.zero_grad()
        error.backward()
        for optimizer in steps:
            (group,) = optimizer.param_groups
            group["lr"] = (1 - step / 200) / 200
            optimizer.step()
            for parameter in group["params"]:
                parameter.data.clamp_(*group["bounds"])
    quantizer.harden()
    assert (x @ quantizer(weight).T - target).square().mean().item() < 0.6 * entry
