from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reconstruction.schedules import anneal, held_out, index_batches, seed_of


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(1, 40), batch_size=st.integers(1, 50), iterations=st.integers(1, 30), seed=st.integers(0, 2**62)
)
def test_batches_have_the_exact_size_and_use_every_image_equally(
    count: int, batch_size: int, iterations: int, seed: int
) -> None:
    batches = index_batches(count, batch_size, iterations, seed=seed)
    assert batches.shape == (iterations, batch_size)
    uses = batches.flatten().bincount(minlength=count)
    assert len(uses) == count
    assert int(uses.max() - uses.min()) <= 1


def test_batches_depend_on_the_seed_only() -> None:
    assert torch.equal(index_batches(10, 4, 9, seed=1), index_batches(10, 4, 9, seed=1))
    assert not torch.equal(index_batches(10, 4, 9, seed=1), index_batches(10, 4, 9, seed=2))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_empty_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        index_batches(*sizes, seed=0)


def test_seeds_are_the_same_in_every_process() -> None:
    command = "from reconstruction.schedules import seed_of; print(seed_of(0, 'joint', 3, 17))"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert int(other) == seed_of(0, "joint", 3, 17)
    assert len({seed_of(0, "joint", k, t) for k in range(20) for t in range(20)}) == 400
    torch.Generator().manual_seed(seed_of(0, "weights", 2**40))


def test_cosine_is_torchs_own() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for step in range(7):
        assert 2.0 * anneal("cosine", step, 7) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert anneal("constant", 5, 7) == 1.0
    assert [anneal("linear", step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="anneal"):
        anneal("steps", 0, 1)


def test_held_out_images_are_the_rest() -> None:
    kept, held = held_out(10, 0.25, seed=0)
    assert len(held) == 2
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(10))
    assert len(held_out(1, 0.9, seed=0)[0]) == 1
    with pytest.raises(ValueError, match="holdout"):
        held_out(4, 1.0, seed=0)
