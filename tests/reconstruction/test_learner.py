"""The learner moves what it was told to move, at rates whose period is the run."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from quantizers.adaquant import AdaQuant
from quantizers.convert import Conversion
from quantizers.layer import quantized_layers
from quantizers.moving_average import MovingAverage
from quantizers.ranges import MinMax
from reconstruction.inundation import Inundation
from reconstruction.learner import Learner, learning_rate
from tests.reconstruction.students import images, student_of

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
TRAINED = partial(AdaQuant, range=MinMax(), learn_range=False)
MOVING = partial(MovingAverage, range=MinMax())


def converted(**changes: Any) -> Conversion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return student_of(network.eval(), images(13), **({"weight": TRAINED, "activation": MOVING} | changes))


def stepped(learner: Learner, conversion: Conversion, done: int = 0, steps: int = 4) -> torch.optim.Optimizer:
    learner.bind(conversion.student)
    optimizer = learner.optimizer()
    conversion.student(images(13)).square().sum().backward()
    learner.step(optimizer, optimizer.step, done, steps)
    return optimizer


@pytest.mark.parametrize("steps", [4, 7, 350])
def test_rates_start_at_one_fall_and_never_rise(steps: int) -> None:
    """The released FDDA's cosine has a period of its own, and rises again within the run."""
    for schedule in ("cosine", "staircase"):
        rates = [learning_rate(schedule, done, steps) for done in range(steps)]  # type: ignore[arg-type]
        assert rates[0] == 1.0
        assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
        assert rates[-1] < 0.2
    assert learning_rate("cosine", steps, steps) == pytest.approx(0.0)
    assert learning_rate("constant", 3, steps) == 1.0


def test_a_staircase_falls_at_a_quarter_half_and_three_quarters() -> None:
    rates = [learning_rate("staircase", done, 400) for done in (99, 100, 199, 200, 299, 300, 399)]
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])


@pytest.mark.parametrize(
    ("learn", "endings"),
    [
        (["weights"], {"weight_quantizer.weight"}),
        (["biases"], {"layer.bias"}),
        (["norms"], {"scale", "shift"}),
        (["weights", "biases", "norms"], {"weight_quantizer.weight", "layer.bias", "scale", "shift"}),
    ],
)
def test_only_what_is_learned_moves(learn: list[Any], endings: set[str]) -> None:
    conversion = converted()
    before = {key: value.clone() for key, value in conversion.student.state_dict().items()}
    stepped(Learner(SGD, learn=learn), conversion)
    moved = {key for key, value in conversion.student.state_dict().items() if not torch.equal(value, before[key])}
    assert all(key.partition(".")[2] in endings for key in moved)
    assert {key.partition(".")[2] for key in moved} == endings


def test_the_rate_of_a_step_is_the_schedules() -> None:
    learner = Learner(SGD, schedule="cosine")
    optimizer = stepped(learner, converted(), done=2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_an_inundated_step_moves_a_share_of_every_tensors_integers() -> None:
    tiny = partial(torch.optim.SGD, lr=1e-7, weight_decay=0.1)
    plain, flooded = converted(), converted()
    before = [q.weight_quantizer.integers(q.weight)[0] for _, q in quantized_layers(plain.student)]
    stepped(Learner(tiny), plain)
    stepped(Learner(tiny, inundation=Inundation(0.05, largest=1e9)), flooded)
    for (_, one), (_, other), integers in zip(
        quantized_layers(plain.student), quantized_layers(flooded.student), before, strict=True
    ):
        assert torch.equal(one.weight_quantizer.integers(one.weight)[0], integers)
        share = (other.weight_quantizer.integers(other.weight)[0] != integers).float().mean()
        assert 0.05 <= float(share) < 0.2


@pytest.mark.parametrize("made", [SGD, partial(torch.optim.Adam, lr=0.01)])
def test_an_inundated_step_of_factor_one_is_the_optimizers(made: Any) -> None:
    plain, flooded = converted(), converted()
    stepped(Learner(made), plain, done=1)
    optimizer = stepped(Learner(made, inundation=Inundation(0.001, largest=1.0)), flooded, done=1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * learning_rate("cosine", 1, 4))
    for mine, reference in zip(flooded.student.parameters(), plain.student.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)


def test_an_inundated_update_is_not_lost_below_the_last_place_of_its_weight() -> None:
    """A step of plain SGD leaves most weights as they are at this rate; the enlarged one moves along the gradient."""
    tiny = partial(torch.optim.SGD, lr=1e-9)
    moved, gradients = [], []
    for inundation in (None, Inundation(0.05, largest=1e12)):
        conversion = converted()
        before = [q.weight_quantizer.weight.detach().clone() for _, q in quantized_layers(conversion.student)]
        stepped(Learner(tiny, learn=["weights"], inundation=inundation), conversion)
        after = [q.weight_quantizer.weight for _, q in quantized_layers(conversion.student)]
        moved.append([float((a != b).float().mean()) for a, b in zip(after, before, strict=True)])
        gradients.append([(b - a.detach(), a.grad) for a, b in zip(after, before, strict=True)])
    assert max(moved[0]) < 0.5 < min(moved[1])
    for step, gradient in gradients[1]:
        assert gradient is not None
        assert float(torch.cosine_similarity(step.flatten(), gradient.flatten(), dim=0)) > 0.9999


def test_a_rounding_that_trains_no_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="got AdaRound; choose weight=straight_through"):
        Learner(SGD).bind(student_of(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), images(4)).student)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": []}, "learn: expected some of"),
        ({"learn": ["scales"]}, "learn: expected some of"),
        ({"schedule": "x"}, "schedule: expected one of"),
    ],
)
def test_bad_choices_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Learner(SGD, **changes)
