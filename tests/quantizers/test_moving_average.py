"""The moving average is corrected once: constants read as they are, and batches weigh as the recursion says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantizers.moving_average import MovingAverage
from quantizers.ranges import MinMax


def quantizer(*, signed: bool = True, decay: float = 0.9) -> MovingAverage:
    made = MovingAverage(4, signed=signed, range=MinMax(), decay=decay)
    made.observing = True
    return made


def test_a_constant_of_one_reads_one_at_every_step() -> None:
    """The released codes read 1103 at the tenth step."""
    made = quantizer()
    for _ in range(200):
        made(torch.ones(3, 2))
        assert float(made.bounds()[1]) == 1.0


@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_bounds_are_the_weighted_means_of_the_batches_extremes(values: list[float], decay: float) -> None:
    made = quantizer(decay=decay)
    for value in values:
        made(torch.tensor([value, value + 1]))
    weights = [decay ** (len(values) - 1 - t) for t in range(len(values))]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert float(made.bounds()[0]) == pytest.approx(mean, abs=1e-4)
    assert float(made.bounds()[1]) == pytest.approx(mean + 1, abs=1e-4)


def test_the_range_follows_and_stays_when_no_longer_observed() -> None:
    made, x = quantizer(signed=False, decay=0.0), torch.linspace(0, 3, 16)
    torch.testing.assert_close(made(x), x)  # 15 steps of 0.2
    made.observing = False
    assert float(made(100 * x).max()) == pytest.approx(3.0)
    assert float(made.scale) == pytest.approx(0.2)


def test_calibration_does_not_count() -> None:
    made = quantizer(signed=False)
    made.initialize(torch.full((4,), 100.0))
    made(torch.full((4,), 2.0))
    assert float(made.scale) == pytest.approx(2 / 15)


@pytest.mark.parametrize("value", [0.0, 1e-20, -2.0])
def test_constants_are_finite(value: float) -> None:
    made, x = quantizer(), torch.full((2, 3), value)
    assert made(x).isfinite().all()
    torch.testing.assert_close(made(x), x)


def test_the_gradient_passes_rounding_and_stops_at_the_ends() -> None:
    made, x = quantizer(signed=False, decay=0.0), torch.linspace(0, 3, 16)
    made(x)
    made.observing = False
    moved: Tensor = torch.tensor([0.31, 7.0], requires_grad=True)
    made(moved).sum().backward()
    assert moved.grad is not None
    assert moved.grad.tolist() == [1.0, 0.0]


def test_averages_belong_to_the_state() -> None:
    made, again = quantizer(), quantizer()
    made(torch.tensor([1.0, 3.0]))
    again.load_state_dict(made.state_dict())
    x = torch.tensor([-2.0, 5.0])
    assert torch.equal(made(x), again(x))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_domain_is_named(decay: float) -> None:
    with pytest.raises(ValueError, match="decay: expected a share"):
        quantizer(decay=decay)
