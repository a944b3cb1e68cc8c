"""Learning rates against torch's own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, MultiStepLR, ReduceLROnPlateau

from synthesis.rates import Constant, Exponential, Plateau, Rates, Staircase, WarmCosine


def optimizer(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


def losses(count: int) -> list[float]:
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return [max(1.0, 5 - 0.2 * i) + float(draws[i]) for i in range(count)]


@pytest.mark.parametrize(("patience", "min_lr"), [(3, 1e-4), (0, 0.0), (10, 0.02)])
def test_plateau_against_torch(patience: int, min_lr: float) -> None:
    ours, theirs = optimizer(0.5), optimizer(0.5)
    mine = Rates(ours, rates=[Plateau(patience, min_lr)])
    reference = ReduceLROnPlateau(theirs, patience=patience, min_lr=min_lr)
    for loss in losses(80):
        mine.step(loss)
        reference.step(loss)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)


def test_groups_have_rules_of_their_own() -> None:
    ours, theirs = optimizer(0.1, 0.01), optimizer(0.01)
    mine = Rates(ours, rates=[Constant(), Exponential(0.95, every=1)])
    reference = ExponentialLR(theirs, 0.95)
    for _ in range(20):
        mine.step(1.0)
        theirs.step()
        reference.step()
        assert ours.param_groups[0]["lr"] == 0.1
        assert ours.param_groups[1]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])


def test_exponential_falls_once_in_every_so_many_steps() -> None:
    assert [Exponential(0.5, every=3).factor(step, 0.0, 1.0) for step in range(7)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]


def test_warm_cosine_rises_falls_and_starts_again() -> None:
    rate = WarmCosine([10, 6], warmup=2)
    found = [rate.factor(step, 0.0, 1.0) for step in range(16)]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert found[:10] == pytest.approx([0.5, 1.0, *cosine])
    assert found[10:12] == [0.5, 1.0]
    assert found[15] < found[13] < found[12] == 1.0


def test_warm_cosine_keeps_its_proportions() -> None:
    published, planned = WarmCosine([2000, 1000], warmup=100), WarmCosine([20, 10], warmup=1)
    planned.plan(3000)
    assert [planned.factor(step, 0.0, 1.0) for step in range(3001)] == [
        published.factor(step, 0.0, 1.0) for step in range(3001)
    ]
    planned.plan(300)
    assert [planned.factor(step, 0.0, 1.0) for step in (9, 199, 200, 209)] == pytest.approx([1, 0, 0.1, 1], abs=1e-4)
    for steps in (1, 2, 7):  # too few for a warm-up
        planned.plan(steps)
        assert all(0 < planned.factor(step, 0.0, 1.0) <= 1 for step in range(steps))


def test_staircase_against_torch() -> None:
    ours, theirs = optimizer(0.5), optimizer(0.5)
    mine = Rates(ours, rates=[Staircase([2000, 2000, 2000, 2000], 0.1)])
    mine.plan(12)
    reference = MultiStepLR(theirs, [3, 6, 9], 0.1)
    for _ in range(15):
        theirs.step()
        mine.step(math.nan)
        reference.step()
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)


def test_only_a_plateau_reads_the_loss() -> None:
    assert Rates(optimizer(1), rates=[Plateau()]).reads_loss
    assert not Rates(optimizer(1), rates=[WarmCosine([3])]).reads_loss
    assert Rates(optimizer(1, 1), rates=[Exponential(), Plateau()]).reads_loss


def test_state_goes_on_where_it_stopped() -> None:
    first, second = optimizer(0.5), optimizer(0.5)
    whole = Rates(first, rates=[Plateau(2)])
    values = losses(40)
    for loss in values[:20]:
        whole.step(loss)
    resumed = Rates(second, rates=[Plateau(2)])
    resumed.load_state_dict(whole.state_dict())
    for loss in values[20:]:
        whole.step(loss)
        resumed.step(loss)
        assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]


def test_a_second_optimizer_does_not_inherit_the_first_one_s_plateau() -> None:
    """A module whose rates are made once by its configuration may be fitted again."""
    rates = [Plateau(2, 1e-4)]
    for _ in range(2):
        ours = optimizer(0.5)
        mine = Rates(ours, rates=rates)
        assert ours.param_groups[0]["lr"] == 0.5
        for _ in range(3):
            mine.step(1.0)
        assert ours.param_groups[0]["lr"] == 0.5
        mine.step(1.0)
        assert ours.param_groups[0]["lr"] == pytest.approx(0.05)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"schedule\.rates: expected 1 or 3"):
        Rates(optimizer(1, 2, 3), rates=[Constant(), Constant()])
    with pytest.raises(ValueError, match="shares"):
        WarmCosine([])
