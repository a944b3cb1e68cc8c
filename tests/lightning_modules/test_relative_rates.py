"""Rates that are shares of what they move: a network whose inside has another unit learns the same."""

from __future__ import annotations

import logging

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from lightning_modules.reconstruction import build_reconstruction
from reconstruction.measurement import warn_of
from tests.configuration import composed
from tests.lightning_modules.reconstruction_runs import learn, trainer_of
from tests.reconstruction.students import images, student_of

SHORT = ("reconstruction.iterations=40", "reconstruction.batch_size=8")


def network(unit: float) -> nn.Module:
    """Three convolutions, what runs between them times `unit`: the same function, for powers of two bit by bit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inside = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        inside[0].weight *= unit
        for layer in (inside[0], inside[2]):
            layer.bias *= unit
        inside[4].weight /= unit
    return inside


def errors_of(unit: float, pipeline: str) -> list[float]:
    """What every layer is left with, as a share of its target's power."""
    cfg, x = composed([f"pipeline={pipeline}", *SHORT]), images(32, seed=2)
    factories = {"weight": instantiate(cfg.weight), "activation": instantiate(cfg.activation)}
    conversion = student_of(network(unit), x, bits=(3, 4), **factories)
    module, datamodule = instantiate(cfg.reconstruction)(conversion=conversion, images=x, seed=0)
    trainer_of(module).fit(module, datamodule=datamodule)
    return [row["error_hard"] for row in module.results]


@pytest.mark.parametrize("pipeline", ["calibrant", "calibrant_fast", "advanced"])
def test_our_pipelines_and_adaquant_learn_the_same_in_any_unit(pipeline: str) -> None:
    expected = errors_of(1.0, pipeline)
    for unit in (2.0**-8, 2.0**8):  # but for Adam's epsilon, which has a unit
        assert errors_of(unit, pipeline) == pytest.approx(expected, rel=0.1)


def test_a_bias_moves_by_a_share_of_the_deviation_of_its_layers_outputs() -> None:
    x = images(16, seed=2)
    found = {}
    for relative in (True, False):
        conversion = student_of(network(1.0), x)
        module, _ = build_reconstruction(
            conversion=conversion, images=x, seed=0, granularity="layer", bias_lr=0.1, bias_relative=relative
        )
        groups = [group for unit in module.learnables for group in unit.groups("weights")]
        found[relative] = [group["lr"] for group in groups if group["kind"] == "bias"]
    y, deviations = x, []
    with torch.no_grad():
        for layer in network(1.0):  # type: ignore[attr-defined]
            y = layer(y)
            if isinstance(layer, nn.Conv2d):
                deviations.append(float(y.transpose(0, 1).flatten(1).var(1, correction=0).mean().sqrt()))
    assert found[True] == pytest.approx([0.1 * deviation for deviation in deviations], rel=1e-5)
    assert found[False] == [0.1] * 3


def test_a_unit_that_ends_worse_than_rounded_to_nearest_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    x = images(16, seed=2)
    learn(student_of(network(1.0), x), x, bias_lr=30.0, bias_relative=False)
    assert "rounding to nearest has" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        learn(student_of(network(1.0), x, bits=(4, 8)), x)
        warn_of("unit", {"soft_fraction": 0.0, "error_hard": 1e-4, "error_nearest": 1e-6})
    assert "rounding to nearest has" not in caplog.text
