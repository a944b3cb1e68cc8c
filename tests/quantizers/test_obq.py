"""OBQ against the greedy definition with an explicit inverse at every step, GPTQ, and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import quantizers.obq
from quantizers.gptq import GPTQ
from quantizers.nearest import Nearest
from quantizers.obq import OBQ
from quantizers.ranges import LpSearch, MinMax
from tests.quantizers.test_gptq import a_hessian, a_weight, damp, output_error


def greedy(weight: Tensor, quantizer: OBQ, H: Tensor, outliers_first: bool = False) -> tuple[Tensor, list[list[int]]]:
    """`q = argmin (Q(w_q) - w_q)^2 / [H_F^-1]_qq`, then the update of what is left; also the order of each row."""
    result, orders = torch.empty(weight.shape, dtype=torch.float64), []
    for r, row in enumerate(weight.double()):
        w, scale, z = row.clone(), quantizer.scale[r].item(), quantizer.zero_point[r].item()
        low, high = quantizer.grid.low - z, quantizer.grid.high - z
        left, order = list(range(len(w))), []
        while left:
            inverse = torch.linalg.inv(H[left][:, left])
            rounded = [min(max(round(w[q].item() / scale), low), high) for q in left]
            errors = [w[q].item() - k * scale for q, k in zip(left, rounded, strict=True)]
            i = min(range(len(left)), key=lambda i: errors[i] ** 2 / inverse[i, i].item())
            outside = [i for i, e in enumerate(errors) if abs(e) > 0.5 * scale * (1 + 1e-8)]
            if outliers_first and outside:
                i = max(outside, key=lambda i: abs(errors[i]))
            w[left] -= errors[i] / inverse[i, i] * inverse[:, i]
            result[r, left[i]] = rounded[i]
            order.append(left.pop(i))
        orders.append(order)
    return result, orders


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("outliers_first", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 5, 13])
def test_equals_the_greedy_definition(bits: int, outliers_first: bool, columns: int) -> None:
    for seed in range(3):
        weight, H = a_weight(4, columns, seed=seed), a_hessian(1, columns, seed=seed)
        quantizer = OBQ(weight, bits, range=LpSearch(steps=20), outliers_first=outliers_first)
        quantizer.solve(weight, H)
        expected, orders = greedy(weight, quantizer, damp(H[0], 0.01), outliers_first)
        assert torch.equal(quantizer.multiples(weight).double(), expected)
    assert columns < 5 or len({tuple(order) for order in orders}) > 1


def test_with_the_order_of_one_row_gptq_gives_the_same_row() -> None:
    weight, H = a_weight(1, 9), a_hessian(1, 9)
    ours = OBQ(weight, 3, range=MinMax(), outliers_first=False)
    ours.solve(weight, H)
    _, (order,) = greedy(weight, ours, damp(H[0], 0.01))
    other = GPTQ(weight[:, order], 3, range=MinMax())
    other.solve(weight[:, order], H[:, order][:, :, order])
    assert torch.equal(ours(weight)[:, order], other(weight[:, order]))


@pytest.mark.parametrize("seed", range(30))
def test_two_weights_are_the_exact_optimum_where_theory_says_so(seed: int) -> None:
    """The second weight is best given the first; so the result is the optimum if the first is rounded as there."""
    weight, H = a_weight(1, 2, seed=seed), a_hessian(1, 2, samples=40, seed=seed)
    quantizer = OBQ(weight, 4, range=MinMax(), percdamp=0.0, outliers_first=False)
    quantizer.solve(weight, H)
    scale = quantizer.scale.item()
    low, high = (int(end - quantizer.zero_point.item()) for end in (quantizer.grid.low, quantizer.grid.high))
    costs = {
        q: output_error(torch.tensor([[q]], dtype=torch.float64) * scale, weight[None], H)
        for q in itertools.product(range(low, high + 1), repeat=2)
    }
    ours = tuple(int(q) for q in quantizer.multiples(weight)[0])
    _, ((first, _),) = greedy(weight, quantizer, H[0])
    assert costs[ours] == min(cost for q, cost in costs.items() if q[first] == ours[first])
    best = min(costs, key=lambda q: costs[q])
    if abs(weight[0, first].item() / scale - best[first]) < 0.5:
        assert ours == best


@pytest.mark.parametrize("bits", [2, 4])
def test_the_output_is_off_less_than_with_rounding_to_nearest_and_with_one_order(bits: int) -> None:
    totals = dict.fromkeys((Nearest, GPTQ, OBQ), 0.0)
    for seed in range(4):
        weight, H = a_weight(16, 40, seed=seed), a_hessian(1, 40, seed=seed)
        for kind in totals:
            quantizer = kind(weight, bits, range=LpSearch(steps=20))
            if not isinstance(quantizer, Nearest):
                quantizer.solve(weight, H)
            totals[kind] += output_error(quantizer(weight), weight, H[0])
    assert totals[OBQ] < totals[GPTQ] < totals[Nearest]


@pytest.mark.parametrize("elements", [1, 2**20])
def test_groups_are_layers_of_their_own_however_many_rows_are_worked_on(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizers.obq, "ELEMENTS", elements)
    weight, H = a_weight(6, 2, 2, 2), a_hessian(3, 8)
    whole = OBQ(weight, 3, range=MinMax())
    whole.solve(weight, H)
    parts = []
    for part, h in zip(weight.chunk(3), H, strict=True):
        alone = OBQ(part, 3, range=MinMax())
        alone.solve(part, h[None])
        parts.append(alone(part))
    assert torch.equal(whole(weight), torch.cat(parts))


@pytest.mark.parametrize("samples", [0, 1])
def test_dead_inputs_dead_channels_and_single_samples(samples: int) -> None:
    weight = a_weight(4, 6)
    weight[1] = 0.0
    x = torch.ones(samples, 6, dtype=torch.float64)
    x[:, 2] = 0.0
    quantizer = OBQ(weight, 3, range=LpSearch(steps=20))
    nearest = quantizer(weight).clone()
    quantizer.solve(weight, 2 * (x.T @ x)[None])
    assert bool(torch.isfinite(quantizer(weight)).all())
    assert torch.equal(quantizer(weight)[:, 2], nearest[:, 2])
    assert not bool(quantizer(weight)[1].any())
    if samples == 0:
        assert torch.equal(quantizer(weight), nearest)
