"""GPTQ against the paper's update with an explicit inverse at every step, brute force, and layers group by group."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantizers.gptq import GPTQ
from quantizers.nearest import Nearest
from quantizers.ranges import LpSearch, MinMax


def a_weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_hessian(groups: int, columns: int, samples: int = 200, seed: int = 1) -> Tensor:
    """Of inputs that are correlated and of different sizes, not centred, as activations behind a ReLU are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(groups, samples, columns, generator=generator, dtype=torch.float64)
    mixed = mixed @ torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    return 2 * mixed.relu().transpose(1, 2) @ mixed.relu()


def damp(H: Tensor, percdamp: float) -> Tensor:
    return H + percdamp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def literal(weight: Tensor, quantizer: GPTQ, H: Tensor, order: list[int]) -> Tensor:
    """Row by row and weight by weight, `dw_F = -(w_q - Q(w_q)) / [H_F^-1]_qq (H_F^-1)_:q`, inverting H_F every time."""
    low, high = quantizer.grid.low, quantizer.grid.high
    result = torch.empty(weight.shape, dtype=torch.float64)
    for r, row in enumerate(weight.double()):
        w, scale, z = row.clone(), quantizer.scale[r].item(), quantizer.zero_point[r].item()
        left = list(order)
        while left:
            inverse = torch.linalg.inv(H[left][:, left])
            q = left[0]
            rounded = min(max(round(w[q].item() / scale), low - z), high - z)
            w[left] -= (w[q].item() - rounded * scale) / inverse[0, 0] * inverse[:, 0]
            result[r, q] = rounded
            left = left[1:]
    return result


def output_error(quantized: Tensor, weight: Tensor, H: Tensor) -> float:
    """`sum (w - q)^T H (w - q)` over rows; both (groups, rows, K)."""
    difference = (weight - quantized).double()
    return float(((difference @ H) * difference).sum())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("block", [1, 3, 128])
def test_equals_the_update_written_out(bits: int, actorder: bool, block: int) -> None:
    for seed in range(3):
        weight, H = a_weight(4, 11, seed=seed), a_hessian(1, 11, seed=seed)
        quantizer = GPTQ(weight, bits, range=LpSearch(steps=20), block=block, actorder=actorder)
        quantizer.solve(weight, H)
        order = H[0].diagonal().argsort(descending=True).tolist() if actorder else list(range(11))
        expected = literal(weight, quantizer, damp(H[0], 0.01), order)
        assert torch.equal(quantizer.multiples(weight).double(), expected)


def test_it_is_nearest_before_it_is_solved_and_where_inputs_are_uncorrelated() -> None:
    weight = a_weight(6, 4, 3, 3)
    quantizer, nearest = (kind(weight, 3, range=LpSearch(steps=20)) for kind in (GPTQ, Nearest))
    assert torch.equal(quantizer(weight), nearest(weight))
    quantizer.solve(weight, torch.diag_embed(torch.rand(1, 36, dtype=torch.float64) + 0.1))
    assert torch.equal(quantizer(weight), nearest(weight))


@pytest.mark.parametrize("seed", range(30))
def test_two_weights_are_the_exact_optimum_where_theory_says_so(seed: int) -> None:
    """Rounding the first weight and then the second to what is best given the first is exact whenever the optimum's
    first error, at the best second weight, is below half a step; and the second weight is always best given the first.
    """
    weight, H = a_weight(1, 2, seed=seed), a_hessian(1, 2, samples=40, seed=seed)
    quantizer = GPTQ(weight, 4, range=MinMax(), percdamp=0.0)
    quantizer.solve(weight, H)
    scale = quantizer.scale.item()
    low, high = (int(end - quantizer.zero_point.item()) for end in (quantizer.grid.low, quantizer.grid.high))
    costs = {
        q: output_error(torch.tensor([[q]], dtype=torch.float64) * scale, weight[None], H)
        for q in itertools.product(range(low, high + 1), repeat=2)
    }
    ours = tuple(int(q) for q in quantizer.multiples(weight)[0])
    assert costs[ours] == min(cost for q, cost in costs.items() if q[0] == ours[0])
    best = min(costs, key=lambda q: costs[q])
    if abs(weight[0, 0].item() / scale - best[0]) < 0.5:
        assert ours == best


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 6), columns=st.integers(1, 30), seed=st.integers(0, 999))
def test_roundings_stay_on_the_grid(bits: int, rows: int, columns: int, seed: int) -> None:
    weight = a_weight(rows, columns, seed=seed)
    quantizer = GPTQ(weight, bits, range=LpSearch(steps=20), actorder=bool(seed % 2))
    quantizer.solve(weight, a_hessian(1, columns, seed=seed))
    q, scale, zero_point = quantizer.integers(weight)
    assert 0 <= int(q.min()) <= int(q.max()) < 2**bits
    assert torch.equal((q - zero_point) * scale, quantizer(weight))


@pytest.mark.parametrize("options", [{}, {"actorder": True}])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_output_is_off_less_than_with_rounding_to_nearest(bits: int, options: dict[str, Any]) -> None:
    shares = []
    for seed in range(8):
        weight, H = a_weight(16, 40, seed=seed), a_hessian(1, 40, seed=seed)
        quantizer = GPTQ(weight, bits, range=LpSearch(steps=20), **options)
        nearest = output_error(quantizer(weight), weight, H[0])
        quantizer.solve(weight, H)
        shares.append(output_error(quantizer(weight), weight, H[0]) / nearest)
    assert max(shares) < 1
    assert sum(shares) / len(shares) < 0.7


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (8, 1, 3, 3), (4, 5)])
@pytest.mark.parametrize("actorder", [False, True])
def test_groups_are_layers_of_their_own(shape: tuple[int, ...], actorder: bool) -> None:
    weight = a_weight(*shape)
    groups, columns = {6: 2, 8: 8, 4: 1}[shape[0]], weight[0].numel()
    H = a_hessian(groups, columns)
    whole = GPTQ(weight, 3, range=MinMax(), actorder=actorder)
    whole.solve(weight, H)
    parts = []
    for part, h in zip(weight.chunk(groups), H, strict=True):
        alone = GPTQ(part, 3, range=MinMax(), actorder=actorder)
        alone.solve(part, h[None])
        parts.append(alone(part))
    assert torch.equal(whole(weight), torch.cat(parts))


def test_one_scale_for_all_channels_and_symmetric_grids() -> None:
    weight, H = a_weight(5, 9), a_hessian(1, 9)
    for options in ({"channel_axis": None}, {"channel_axis": 1}, {"symmetric": True}):
        quantizer = GPTQ(weight, 4, range=MinMax(), **options)
        before = output_error(quantizer(weight), weight, H[0])
        quantizer.solve(weight, H)
        assert output_error(quantizer(weight), weight, H[0]) < before


def test_dead_inputs_are_rounded_to_nearest_and_do_not_disturb_the_others() -> None:
    weight, H = a_weight(4, 8), a_hessian(1, 6)
    alive = [0, 1, 3, 4, 6, 7]
    padded = torch.zeros(1, 8, 8, dtype=torch.float64)
    for i, j in itertools.product(range(6), repeat=2):
        padded[0, alive[i], alive[j]] = H[0, i, j]
    for factor in (1e-12, 1.0, 1e12):  # the damping is relative to what is alive
        quantizer = GPTQ(weight, 3, range=MinMax())
        nearest = quantizer(weight).clone()
        quantizer.solve(weight, factor * padded)
        few = GPTQ(weight[:, alive], 3, range=MinMax())
        few.set_range(quantizer.scale, quantizer.zero_point)
        few.solve(weight[:, alive], factor * H)
        assert torch.equal(quantizer(weight)[:, [2, 5]], nearest[:, [2, 5]])
        assert torch.equal(quantizer(weight)[:, alive], few(weight[:, alive]))


@pytest.mark.parametrize("samples", [0, 1])
def test_no_or_a_single_sample_and_dead_channels_are_finite(samples: int) -> None:
    weight = a_weight(4, 6)
    weight[1] = 0.0
    x = torch.ones(samples, 6, dtype=torch.float64)
    quantizer = GPTQ(weight, 3, range=LpSearch(steps=20))
    quantizer.solve(weight, 2 * (x.T @ x)[None])
    assert bool(torch.isfinite(quantizer(weight)).all())
    assert not bool(quantizer(weight)[1].any())


def test_what_cannot_be_solved_is_refused_by_name() -> None:
    weight = a_weight(4, 6)
    quantizer = GPTQ(weight, 3, range=MinMax(), percdamp=0.0)
    with pytest.raises(ValueError, match=r"hessian: expected \(groups, 6, 6"):
        quantizer.solve(weight, torch.eye(5)[None])
    with pytest.raises(ValueError, match="hessian: expected finite"):
        quantizer.solve(weight, torch.full((1, 6, 6), float("nan")))
    with pytest.raises(ValueError, match="percdamp: the Hessian is singular"):
        quantizer.solve(weight, torch.ones(1, 6, 6))
    with pytest.raises(ValueError, match="percdamp"):
        GPTQ(weight, 3, range=MinMax(), percdamp=-1.0)
    with pytest.raises(ValueError, match="block"):
        GPTQ(weight, 3, range=MinMax(), block=0)
