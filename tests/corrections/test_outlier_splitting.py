"""Splitting is exact in float, halves the outliers, and leaves other readers and quantization points as they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from corrections.outlier_splitting import OutlierSplitting, split_channels
from quantizers.fold import fold
from reconstruction.partition import partition
from tests.corrections.networks import chain, images, residual, student_of


@pytest.mark.parametrize(("make", "skipped"), [(chain, {"0", "3", "6"}), (residual, {"stem"})])
@pytest.mark.parametrize("ratio", [0.02, 0.5])
def test_float_function_stays(make: object, skipped: set[str], ratio: float) -> None:
    network = make()  # type: ignore[operator]
    traced = fold(network, images(1))
    facts = OutlierSplitting(expand_ratio=ratio).prepare(traced)
    torch.testing.assert_close(traced.graph_module(images()), network(images()), rtol=1e-5, atol=1e-6)
    for path, count in facts["added_channels"].items():
        before = network.get_submodule(path).weight.shape[1]  # type: ignore[index, union-attr]
        assert count == math.ceil(ratio * before)
        assert traced.graph_module.get_submodule(path).weight.shape[1] == before + count  # type: ignore[index, union-attr]
    assert set(facts["skipped"]) == skipped


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.sampled_from([0, 1]))
def test_copies_add_up_to_the_weight_and_the_largest_goes_first(seed: int, ratio: float, axis: int) -> None:
    weight = torch.randn(5, 5, 2, 2, generator=torch.Generator().manual_seed(seed))
    weight[3] *= 20
    wide, index = split_channels(weight, axis, ratio)
    back = torch.zeros_like(weight).index_add_(axis, index, wide)
    torch.testing.assert_close(back, weight, rtol=1e-6, atol=0.0)
    assert index[:5].tolist() == list(range(5))
    # a plain loop: a list of channels, the one with the largest absolute weight replaced by two halves
    parts = [(channel, i) for i, channel in enumerate(weight.unbind(axis))]
    for _ in range(math.ceil(ratio * 5)):
        worst = max(range(len(parts)), key=lambda k: float(parts[k][0].abs().max()))
        channel, i = parts[worst]
        parts[worst] = (channel / 2, i)
        parts.append((channel / 2, i))
    assert index.tolist() == [i for _, i in parts]
    assert torch.equal(wide, torch.stack([channel for channel, _ in parts], axis))


def test_negative_outliers_are_outliers() -> None:
    weight = torch.ones(2, 3, 1, 1)
    weight[0, 1] = -8.0
    wide, index = split_channels(weight, 1, 0.01)
    assert index.tolist() == [0, 1, 2, 1]
    assert float(wide.abs().max()) == 4.0


def test_activations_are_quantized_where_they_were_and_units_still_chain() -> None:
    plain = student_of(residual())
    split = student_of(residual(), prepare=OutlierSplitting(expand_ratio=0.2).prepare)

    def tensors(conversion: object) -> list[tuple[str, bool]]:
        return [(r.name, r.signed) for r in conversion.report if r.kind == "activation"]  # type: ignore[attr-defined]

    assert tensors(split) == tensors(plain)
    units = partition(split.reference, "block")
    assert [unit.inputs for unit in units][1:] == [unit.outputs for unit in units][:-1]
    names = {name for unit in units for name in unit.nodes}
    assert names >= {n.name for n in split.reference.graph.nodes if n.op == "call_module"}


def test_transposed_and_linear_over_tokens() -> None:
    torch.manual_seed(0)
    up = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2)).eval()
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 4)).eval()
    for network in (up, tokens):
        traced = fold(network, images(1))
        OutlierSplitting(expand_ratio=0.3).prepare(traced)
        torch.testing.assert_close(traced.graph_module(images()), network(images()), rtol=1e-5, atol=1e-6)


def test_bad_ratio_is_named() -> None:
    with pytest.raises(ValueError, match="expand_ratio"):
        OutlierSplitting(expand_ratio=0.0)
