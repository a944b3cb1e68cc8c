"""The search space in Hydra's own words: choices, ranges and intervals, as they are swept over."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

DIGITS = 12  # of the steps of a range of floats


@dataclass(frozen=True, kw_only=True)
class Space:
    """Attributes:
    fixed: values by key that all trials share.
    distributions: by key, in their order.
    """

    fixed: Mapping[str, str]
    distributions: Mapping[str, BaseDistribution]

    def overrides(self, params: Mapping[str, Any]) -> dict[str, str]:
        """What one trial overrides: the text of each value by key."""
        return dict(self.fixed) | {key: str(value) for key, value in params.items()}


def read_space(arguments: Iterable[str], loader: ConfigLoader) -> Space:
    """The space that the arguments span; of two with the same key the later one counts.

    `a,b` and `choice(a,b)` are categories; `range(2,9)` and `range(0.1,0.5,0.1)` numbers with a step, without the stop;
    `interval(1e-5,1e-3)` real numbers and `int(interval(1,8))` whole ones, with both ends; `tag(log, ...)` searches in
    the logarithm.

    Raises:
        ValueError: if nothing is open, or a range or interval is empty.
    """
    fixed: dict[str, str] = {}
    distributions: dict[str, BaseDistribution] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(arguments)):
        key = override.get_key_element()
        fixed.pop(key, None)
        distributions.pop(key, None)
        if override.is_sweep_override():
            distributions[key] = distribution(override)
        else:
            fixed[key] = override.get_value_element_as_str()
    if not distributions:
        raise ValueError(
            "search space: expected a parameter with several values, such as bits.weight=range(2,9), got none"
        )
    return Space(fixed=fixed, distributions=distributions)


def distribution(override: Override) -> BaseDistribution:
    """What Optuna draws one parameter from."""
    value: Any = override.value()
    text = override.input_line
    if isinstance(value, RangeSweep):
        return _stepped(value, text)
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if low is None or high is None or not low < high or (log and low <= 0):
            raise ValueError(f"search space: expected an interval from low to high (above 0 with log), got {text}")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    choices = list(override.sweep_string_iterator())
    if not choices:
        raise ValueError(f"search space: expected values to choose from, got none in {text}")
    return CategoricalDistribution(choices)


def _stepped(value: RangeSweep, text: str | None) -> BaseDistribution:
    assert value.start is not None
    assert value.stop is not None
    numbers = sorted(round(number, DIGITS) for number in value.range())
    if not numbers:
        raise ValueError(f"search space: expected a range with numbers in it, got {text}")
    log, step = "log" in value.tags, abs(value.step)
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(numbers[0]), int(numbers[-1]), log=log, step=1 if log else int(step))
    if log:
        raise ValueError(f"search space: expected an interval for real numbers with log, got {text}")
    return FloatDistribution(numbers[0], numbers[-1], step=step)


def points(distributions: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """All combinations in the order of the keys, the last of which changes fastest.

    Raises:
        ValueError: for an interval of real numbers, which has no end of points.
    """
    columns = [_values(key, one) for key, one in distributions.items()]
    return [dict(zip(distributions, row, strict=True)) for row in itertools.product(*columns)]


def _values(key: str, one: BaseDistribution) -> list[Any]:
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    if isinstance(one, IntDistribution):
        return list(range(one.low, one.high + 1, one.step))
    if isinstance(one, FloatDistribution) and one.step is not None:
        count = round((one.high - one.low) / one.step) + 1
        return [round(one.low + i * one.step, DIGITS) for i in range(count)]
    raise ValueError(f"sampler: the grid expects choices or a range for {key}, got an interval; choose another sampler")
