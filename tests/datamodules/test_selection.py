"""Choosing images: equal shares, prefixes, seeds, even spacing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.selection import evenly_spaced, stratified


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 5), st.data())
def test_stratified_shares_are_equal_and_nested(classes: int, each: int, seed: int, data: st.DataObject):
    labels = torch.arange(classes).repeat_interleave(each) * 3
    count = data.draw(st.integers(1, classes * each))
    chosen = stratified(labels, count, seed)
    assert len(set(chosen.tolist())) == count
    shares = torch.bincount(labels[chosen] // 3, minlength=classes)
    assert shares.max() - shares.min() <= 1
    assert torch.equal(stratified(labels, classes * each, seed)[:count], chosen)


def test_unequal_classes_are_used_up_one_after_the_other():
    labels = torch.tensor([0, 1, 1, 1, 2, 2])
    shares = [torch.bincount(labels[stratified(labels, n, 1)], minlength=3).tolist() for n in (3, 5, 6)]
    assert shares == [[1, 1, 1], [1, 2, 2], [1, 3, 2]]


def test_seeds_choose_differently_and_every_image_is_reachable():
    labels = torch.arange(4).repeat(25)
    choices = [stratified(labels, 8, seed) for seed in range(100)]
    assert torch.equal(choices[0], stratified(labels, 8, 0))
    assert len({tuple(choice.tolist()) for choice in choices}) == 100
    assert torch.cat(choices).unique().numel() == 100


@pytest.mark.parametrize("count", [0, 11])
def test_too_many_or_none_names_the_maximum(count: int):
    with pytest.raises(ValueError, match=rf"calibration\.count: expected 1 to 10 .*got {count}"):
        stratified(torch.zeros(10), count, 0)


def test_evenly_spaced():
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, None).tolist() == evenly_spaced(3, 5).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"data\.limit"):
        evenly_spaced(3, 0)
