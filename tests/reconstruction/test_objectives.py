from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from reconstruction.objectives import PowerError, UnitLoss, total
from tests.reconstruction.students import skip_at


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4, 2), (3, 6, 5)])
def test_squared_error_is_torchs_mean_times_the_channels(shape: tuple[int, ...]) -> None:
    y, target = torch.randn(shape), torch.randn(shape)
    expected = F.mse_loss(y, target) * shape[1]
    torch.testing.assert_close(PowerError()(y, target).mean(), expected)
    torch.testing.assert_close(PowerError(2.0 + 1e-9)(y, target), PowerError()(y, target))


def test_other_powers_and_several_outputs() -> None:
    y, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = (y - target).abs().pow(2.4).sum(1).mean(1)
    torch.testing.assert_close(PowerError(2.4)(y, target), expected)
    error = PowerError(2.4)(y, target)
    torch.testing.assert_close(total([error, error]), 2 * expected)


@pytest.mark.parametrize("p", [0.0, 0.5, math.nan])
def test_exponents_below_one_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p: expected an exponent of at least 1, got"):
        PowerError(p)


def test_error_is_float32_for_half_inputs() -> None:
    y = torch.full((1, 1000), 300.0, dtype=torch.float16)
    assert float(PowerError()(y, torch.zeros_like(y))) == 1000 * 300.0**2


@pytest.mark.parametrize(
    ("kind", "entry", "power", "expected"),
    [
        ("entry_error", 0.3, 5.0, 0.3),
        ("power", 0.3, 5.0, 5.0),
        ("none", 0.3, 5.0, 1.0),
        ("entry_error", 0.0, 5.0, 5e-8),
    ],
)
def test_normalizers(kind: str, entry: float, power: float, expected: float) -> None:
    loss = UnitLoss(normalization=kind)  # type: ignore[arg-type]
    assert loss.normalizer(entry_error=entry, power=power) == pytest.approx(expected)


def test_a_dead_unit_has_a_normalizer() -> None:
    assert UnitLoss().normalizer(entry_error=0.0, power=0.0) == 1.0


def test_the_error_of_a_layer_is_taken_behind_its_activation_function() -> None:
    conversion, cache = skip_at(1)  # a layer that a ReLU follows
    (y,) = cache.student_module(*cache.student_inputs)
    before = conversion.student.second(cache.student_input)
    target = conversion.reference.second(cache.teacher_input).relu()
    expected = (before.relu() - target).square().sum(1)
    torch.testing.assert_close(PowerError().errors(cache, [y], slice(0, 10)), expected)
    assert bool((before < 0).any())
