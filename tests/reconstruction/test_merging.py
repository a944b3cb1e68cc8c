from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from quantizers.fold import fold
from reconstruction.merging import merge, pairs_to_merge
from reconstruction.partition import Unit, partition
from tests.reconstruction.students import images


@given(capacities=st.lists(st.integers(1, 50), min_size=2, max_size=7), merges=st.integers(1, 6))
def test_the_chosen_pairs_have_the_largest_differences_of_all_choices(capacities: list[int], merges: int) -> None:
    differences = [abs(a - b) for a, b in pairwise(capacities)]
    chosen = pairs_to_merge(capacities, merges)
    assert len(chosen) == min(merges, len(differences))
    best = max(sum(differences[i] for i in some) for some in combinations(range(len(differences)), len(chosen)))
    assert sum(differences[i] for i in chosen) == best


def test_shares_are_rounded_and_at_least_one() -> None:
    capacities = [1, 2, 4, 8, 16, 32, 64, 128, 256]  # 8 pairs, the last differ most
    assert pairs_to_merge(capacities, 0.25) == [6, 7]
    assert pairs_to_merge(capacities, 0.01) == [7]
    assert pairs_to_merge(capacities, 2) == [6, 7]
    assert pairs_to_merge([5], 0.5) == []
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="merges"):
            pairs_to_merge(capacities, wrong)


def test_stem_and_classifier_stay_alone_and_glue_goes_with_its_neighbours() -> None:
    blocks = [(name, [name]) for name in ("stem", "pool", "a", "glue", "b", "c", "mean", "fc")]
    merged = merge(blocks, [900, 0, 1, 0, 50, 51, 0, 2000], 1)  # type: ignore[arg-type]
    assert [name for name, _ in merged] == ["stem", "pool", "a+b", "c", "mean", "fc"]
    assert merged[2][1] == ["a", "glue", "b"]
    both = merge(blocks, [900, 0, 1, 0, 50, 51, 0, 2000], 5)  # type: ignore[arg-type]
    assert [name for name, _ in both] == ["stem", "pool", "a+b+c", "mean", "fc"]


def resnet18(granularity: str, **arguments: float) -> list[Unit]:
    network = torchvision.models.resnet18().eval()
    return partition(fold(network, images(1, 64, 3)).graph_module, granularity, **arguments)  # type: ignore[arg-type]


def test_a_resnet_is_merged_where_its_width_changes() -> None:
    names = [unit.name for unit in resnet18("merged", merges=2) if unit.layers]
    assert "layer3.1+layer4.0+layer4.1" in names  # 1.2, 3.7 and 4.7 million weights
    assert {"conv1", "layer1.0", "fc"} <= set(names)
    assert len([unit for unit in resnet18("merged") if unit.layers]) == 10 - 2  # a quarter of seven pairs
