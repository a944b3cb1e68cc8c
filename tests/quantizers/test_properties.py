"""What every quantizer owes, whatever its method: levels, idempotence, monotony, dtype, hardening, integers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.adaquant import AdaQuant
from quantizers.adaround import AdaRound
from quantizers.base import Quantizer
from quantizers.flexround import FlexRound
from quantizers.genie_m import GenieM
from quantizers.gptq import GPTQ
from quantizers.lsq import LSQ
from quantizers.lsq_plus import LSQPlus
from quantizers.nearest import Nearest, NearestActivation
from quantizers.obq import OBQ
from quantizers.ranges import LpSearch, MinMax, Percentile, Range
from quantizers.signround import SignRound
from quantizers.squant import SQuant

WEIGHT_METHODS = [Nearest, AdaRound, AdaQuant, GenieM, FlexRound, SignRound, SQuant, GPTQ, OBQ]
ACTIVATION_METHODS = [NearestActivation, LSQ, LSQPlus]
RANGES = [MinMax(), Percentile(99.0), LpSearch(steps=20)]

weights = st.builds(
    lambda seed, channels, size, magnitude: (
        torch.randn(channels, size, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    ),
    st.integers(0, 2**16),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(-6, 4),
)
bits = st.integers(2, 16)
choice = settings(max_examples=25, deadline=None)


def nudge(quantizer: Quantizer) -> None:
    """Move everything that is learned, as a few steps of an optimiser would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for group in quantizer.parameter_groups():
            for parameter in group["params"]:
                parameter.add_(30 * group["lr"] * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("method", WEIGHT_METHODS)
@given(
    weight=weights, bits=bits, symmetric=st.booleans(), range=st.sampled_from(RANGES), axis=st.sampled_from([None, 0])
)
@choice
def test_a_hardened_weight_is_its_integers(
    method: type, weight: Tensor, bits: int, symmetric: bool, range: Range, axis: int | None
) -> None:
    quantizer = method(weight, bits, symmetric=symmetric, range=range, channel_axis=axis)
    nudge(quantizer)
    announced = quantizer.integers(weight)
    quantizer.harden()
    hardened = quantizer(weight)
    q, scale, zero_point = quantizer.integers(weight)
    assert q.dtype == torch.int32
    assert quantizer.grid.low <= q.min()
    assert q.max() <= quantizer.grid.high
    assert torch.equal((q - zero_point) * scale, hardened)
    assert all(torch.equal(a, b) for a, b in zip(announced, (q, scale, zero_point), strict=True))
    state = copy.deepcopy(quantizer.state_dict())
    quantizer.harden()
    assert all(torch.equal(state[name], value) for name, value in quantizer.state_dict().items())
    assert torch.equal(quantizer(weight), hardened)
    assert quantizer.soft_fraction() == 0
    assert all(len(row.unique()) <= 2**bits for row in hardened)


@pytest.mark.parametrize("method", ACTIVATION_METHODS)
@given(x=weights, bits=bits, signed=st.booleans(), symmetric=st.booleans(), range=st.sampled_from(RANGES))
@choice
def test_activations(method: type, x: Tensor, bits: int, signed: bool, symmetric: bool, range: Range) -> None:
    quantizer = method(bits, signed=signed, symmetric=symmetric, range=range)
    quantizer.initialize(x)
    with torch.no_grad():
        once = quantizer(x)
        grid, scale, zero_point = quantizer.grid, quantizer.scale.detach(), quantizer.zero_point
        low, high = (grid.low - zero_point) * scale, (grid.high - zero_point) * scale
        inside = (x >= low) & (x <= high)
        assert bool(((once - x).abs()[inside] <= scale * 0.5 + x.abs()[inside] * 1e-5).all())
        assert torch.equal(quantizer(once), once)
        ordered = x.flatten().sort().values
        assert bool((quantizer(ordered).diff() >= 0).all())
        assert len(once.unique()) <= 2**bits
        assert bool((quantizer(torch.zeros(3)) == 0).all())
        q, scale, zero_point = quantizer.integers(x)
        assert torch.equal((q - zero_point) * scale, once)


@pytest.mark.parametrize("method", WEIGHT_METHODS)
@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), -2.0), torch.ones(1, 1)])
def test_dead_and_constant_weights_learn_without_nan(method: type, weight: Tensor) -> None:
    quantizer = method(weight, 3, range=LpSearch())
    loss = quantizer(weight).square().sum() + quantizer.regularizer(0.5)
    if loss.requires_grad:
        loss.backward()
    gradients = [p.grad for p in quantizer.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(g).all()) for g in [*gradients, quantizer(weight).detach()])
    quantizer.harden()
    torch.testing.assert_close(quantizer(weight).detach(), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_autocast_changes_no_rounding_of_weights(method: type, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer = method(weight, 4, range=LpSearch())
    expected, penalty = quantizer(weight), quantizer.regularizer(0.5)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(quantizer(weight), expected)
        assert torch.equal(quantizer.regularizer(0.5), penalty)
        again = method(weight, 4, range=LpSearch())
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), quantizer.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ACTIVATION_METHODS)
def test_activations_are_rounded_in_float32_and_returned_as_they_came(method: type, dtype: torch.dtype) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantizer = method(8, signed=True, range=MinMax())
    quantizer.initialize(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = quantizer(x)
    assert output.dtype == dtype
    assert torch.equal(output, quantizer(x.float()).to(dtype))


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_state_round_trips_and_is_all_there_is(method: type) -> None:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    quantizer = method(weight, 3, range=LpSearch())
    nudge(quantizer)
    other = method(torch.zeros(6, 5), 3, range=LpSearch())
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(weight), quantizer(weight))
    assert torch.equal(copy.deepcopy(quantizer)(weight), quantizer(weight))


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_groups_hold_every_parameter_once(method: type) -> None:
    quantizer = method(torch.randn(6, 5, 3, 3), 3, range=MinMax())
    grouped = [p for group in quantizer.parameter_groups() for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(id(p) for p in quantizer.parameters() if p.requires_grad)
    for group in quantizer.parameter_groups():
        assert set(group) >= {"params", "lr", "anneal", "kind"}
        assert set(group) <= {"params", "lr", "anneal", "kind", "betas", "eps", "bounds", "over_steps", "stated_for"}
        assert group["kind"] in ("rounding", "scale", "weight")
        assert group["anneal"] in ("constant", "cosine", "linear")
        assert isinstance(group["lr"], float)
        assert group["lr"] > 0
