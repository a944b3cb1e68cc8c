from __future__ import annotations

from functools import partial

import pytest
import torch

from quantizers.adaquant import AdaQuant
from quantizers.flexround import FlexRound
from quantizers.genie_m import GenieM
from quantizers.layer import quantized_layers
from quantizers.ranges import MinMax
from quantizers.signround import SignRound
from reconstruction.learnables import Learnables, learnables_of
from reconstruction.optimizer import LARGEST_RAISE, adam_for_all
from reconstruction.partition import partition
from reconstruction.schedules import Epoch
from tests.reconstruction.students import images, resnet8, student_of


def units_of(weight: object = None, bias_lr: float | None = None) -> list[Learnables]:
    conversion = student_of(resnet8(), images(8), weight=weight)
    paths = [path for path, _ in quantized_layers(conversion.student)]
    rates = None if bias_lr is None else {path: bias_lr * (k + 1) for k, path in enumerate(paths)}
    return learnables_of(conversion.student, partition(conversion.reference, "block"), bias_rates=rates)


@pytest.mark.parametrize("weight", [None, partial(GenieM, range=MinMax()), partial(AdaQuant, range=MinMax())])
def test_hardened_is_over_when_left(weight: object) -> None:
    block = units_of(weight)[1]
    before = [t.clone() for q in block.quantizers for t in q.state_dict().values()]
    with block.hardened():
        assert block.soft_fraction() == 0.0
    after = [t for q in block.quantizers for t in q.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_penalty_is_the_mean_over_all_roundings_of_the_unit() -> None:
    block = units_of()[1]
    every = torch.cat([q.V.flatten() for q in block.weight_quantizers])
    h = (torch.sigmoid(every) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(block.regularizer(1.0), (1 - (2 * h - 1).abs().pow(2.0)).mean())
    assert block.soft_fraction() == pytest.approx(float(((h > 0) & (h < 1)).float().mean()))


def test_phases_share_out_the_groups() -> None:
    block = units_of(bias_lr=0.1)[1]
    kinds = {phase: [g["kind"] for g in block.groups(phase)] for phase in ("joint", "weights", "activations")}
    assert kinds["weights"] == ["rounding", "rounding", "bias", "bias"]
    assert [g["lr"] for g in block.groups("weights")[2:]] == pytest.approx([0.2, 0.3])  # layers 2 and 3 of the network
    assert kinds["activations"] == ["scale", "scale"]
    assert kinds["joint"] == kinds["weights"] + kinds["activations"]
    assert len(block.parameters("joint")) == 6


def test_one_adam_has_as_many_groups_as_the_largest_unit_and_restarts_its_rates() -> None:
    units = units_of()
    epochs = [Epoch("joint", k, 4) for k, unit in enumerate(units) if unit.groups("joint")]
    optimizer, schedule = adam_for_all(epochs, units)
    assert len(optimizer.param_groups) == 4
    seen = []
    for _ in range(8):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    cosine = [0.5 * (1 + torch.cos(torch.tensor(torch.pi * t / 4)).item()) for t in range(4)]
    assert [row[:2] for row in seen[:4]] == [pytest.approx([0.05, 1e-3 * c]) for c in cosine]
    assert all(row[2:] == [0.0, 0.0] for row in seen[:4])
    assert seen[4:] == [pytest.approx([0.05, 0.05, 1e-3 * c, 1e-3 * c]) for c in cosine]


@pytest.mark.parametrize(("stated", "raise_by"), [(None, 1.0), (40, 10.0), (2, 1.0), (10_000, LARGEST_RAISE)])
def test_rates_stated_for_more_steps_are_raised_in_proportion(stated: int | None, raise_by: float) -> None:
    units = units_of()
    epochs = [Epoch("joint", k, 4) for k, unit in enumerate(units) if unit.groups("joint")]
    plain, _ = adam_for_all(epochs, units)
    raised, _ = adam_for_all(epochs, units, rates_stated_for=stated)
    for a, b in zip(plain.param_groups, raised.param_groups, strict=True):
        assert b["lr"] == pytest.approx(raise_by * a["lr"])


def test_a_rounding_may_state_the_steps_of_its_own_rates() -> None:
    units = units_of(weight=partial(FlexRound, range=MinMax(), lr=1e-3, stated_for=20))
    epochs = [Epoch("joint", k, 4) for k, unit in enumerate(units) if unit.groups("joint")]
    optimizer, _ = adam_for_all(epochs, units, rates_stated_for=40)
    rates = {id(p): slot["lr"] for slot in optimizer.param_groups for p in slot["params"]}
    raised = set()
    for group in units[epochs[0].unit].groups("joint"):  # the unit whose rates the slots have now
        for parameter in group["params"]:
            raised.add(("stated_for" in group, round(rates[id(parameter)] / group["lr"], 6)))
    assert raised == {(True, 5.0), (False, 10.0)}


def test_groups_with_other_options_have_slots_of_their_own() -> None:
    """The last unit has no activation steps; its clip ends must not share a slot with those of the others."""
    units = units_of(weight=partial(SignRound, range=MinMax()))
    epochs = [Epoch("joint", k, 4) for k, unit in enumerate(units) if unit.groups("joint")]
    optimizer, _ = adam_for_all(epochs, units)
    kinds = [(group["betas"], group["eps"], group.get("bounds")) for group in optimizer.param_groups]
    adam = ((0.9, 0.999), 1e-8, None)
    assert sorted(map(str, kinds)) == sorted(
        map(str, 2 * [((0.0, 0.0), 1e-15, (-0.5, 0.5)), ((0.0, 0.0), 1e-15, (1e-3, 1.0)), adam])
    )
    seen = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in seen}) == len(seen) == sum(len(unit.parameters("joint")) for unit in units)
    for group, (_, eps, bounds) in zip(optimizer.param_groups, kinds, strict=True):
        for parameter in group["params"]:
            matching = [g for unit in units for g in unit.groups("joint") if any(p is parameter for p in g["params"])]
            assert [(g.get("eps", 1e-8), g.get("bounds")) for g in matching] == [(eps, bounds)]
    first = units[epochs[0].unit].groups("joint")
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for group in first:
        expected = group["lr"] / 4 if group.get("over_steps") else group["lr"]
        assert all(by_id[id(p)] == pytest.approx(expected) for p in group["params"])
