"""The plain unit that ours is timed against computes what ours computes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.plain_torch import PlainAdaQuant, PlainAdaRound, PlainLayer, PlainLSQ, PlainStep, plain
from quantizers.adaquant import AdaQuant
from quantizers.flexround import FlexRound
from quantizers.ranges import MinMax, Percentile
from reconstruction.activations import ActivationCache
from reconstruction.partition import partition
from tests.reconstruction.students import images, resnet8, student_of


def entered(weight: Any = None) -> ActivationCache:
    x = images(8)
    conversion = student_of(resnet8(), x, weight=weight)
    units = partition(conversion.reference, "block")
    cache = ActivationCache(conversion.reference, conversion.student, units=units, images=x)
    cache.enter(1)
    return cache


ADAQUANT = partial(AdaQuant, range=Percentile(90.0))  # some weights are clipped, by which zero points learn
LEARNED = {PlainAdaRound: {"alpha": "V"}, PlainAdaQuant: {name: name for name in ("weight", "scale", "zero_point")}}


@pytest.mark.parametrize("weight", [None, ADAQUANT])
def test_outputs_and_gradients_are_those_of_our_quantizers(weight: Any) -> None:
    cache = entered(weight)
    ours, theirs = cache.student_module, plain(cache.student_module, drop=0.5).eval()
    x, target = cache.student_inputs[0], cache.targets[0]
    losses = [(unit(x)[0] - target).square().mean() for unit in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    assert len([m for m in theirs.modules() if isinstance(m, PlainLayer | PlainLSQ)]) > 3
    for path, module in theirs.named_modules():
        if isinstance(module, PlainLayer):
            quantizer = ours.get_submodule(path).weight_quantizer
            for name, our_name in LEARNED[type(module)].items():
                expected = getattr(quantizer, our_name).grad
                assert expected.abs().sum() > 0
                torch.testing.assert_close(getattr(module, name).grad, expected, rtol=1e-3, atol=1e-7)
        elif isinstance(module, PlainLSQ):
            expected = ours.get_submodule(path).quantizer.scale.grad
            torch.testing.assert_close(module.scale.grad, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("weight", "options"), [(None, {"power": 2.0}), (ADAQUANT, {"power": 2.4}), (ADAQUANT, {"biases": True})]
)
def test_its_steps_lower_the_error(weight: Any, options: Any) -> None:
    cache = entered(weight)
    inputs = cache.student_inputs[0], cache.teacher_inputs[0]
    step = PlainStep(cache.student_module, inputs, cache.targets[0], batch_size=4, drop=0.0, **options)

    def error() -> float:
        with torch.no_grad():
            return float((step.unit(inputs[0])[0] - cache.targets[0]).square().mean())

    before = error()
    for _ in range(30):
        step()
    assert error() < before


def test_other_quantizers_are_refused() -> None:
    cache = entered(partial(FlexRound, range=MinMax()))
    with pytest.raises(ValueError, match="expected AdaRound or AdaQuant, got FlexRound"):
        plain(cache.student_module, drop=0.0)
