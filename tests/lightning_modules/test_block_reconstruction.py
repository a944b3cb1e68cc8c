"""Reconstruction equals a plain loop, beats rounding to nearest, learns what it should and leaves the rest alone."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.reconstruction import build_reconstruction
from quantizers.adaquant import AdaQuant
from quantizers.adaround import AdaRound
from quantizers.flexround import FlexRound
from quantizers.genie_m import GenieM
from quantizers.layer import quantizers_of, sites
from quantizers.lsq import LSQ
from quantizers.nearest import Nearest, NearestActivation
from quantizers.ranges import MinMax
from quantizers.signround import SignRound
from reconstruction.partition import Granularity
from tests.lightning_modules.plain_reconstruction import plain_loop
from tests.lightning_modules.reconstruction_runs import OBJECTIVES, SETTINGS, KillAndWatch, learn, same, trainer_of
from tests.reconstruction.students import images, resnet8, student_of


@pytest.mark.parametrize(
    ("drop", "objective", "parallel", "weight"),
    [
        (0.0, "mse", False, None),
        (0.5, "mse", False, None),
        (0.5, "lp", False, partial(AdaQuant, range=MinMax(), weight_lr=0.05)),
        (0.0, "fisher", False, None),
        (0.5, "fisher", True, None),
        (0.5, "pd", False, None),
        (0.0, "mse", True, None),
        (0.5, "mse", False, partial(AdaQuant, range=MinMax(), weight_lr=0.05)),
    ],
)
def test_equals_a_plain_loop_bit_for_bit(drop: float, objective: str, parallel: bool, weight: Any) -> None:
    x = images(10)
    one = student_of(resnet8(), x, weight=weight)
    other = student_of(resnet8(), x, weight=weight)
    start = copy.deepcopy(one.student)
    learn(one, x, drop=drop, objective=OBJECTIVES[objective], schedule="parallel" if parallel else "sequential")
    plain_loop(other, x, iterations=5, batch_size=4, drop=drop, seed=3, objective=objective, parallel=parallel)
    assert same(one.student, other.student)
    assert not same(one.student, start)


@pytest.mark.parametrize(
    "weight",
    [
        partial(FlexRound, range=MinMax(), lr=1e-3),
        partial(FlexRound, range=MinMax(), lr=1e-3, stated_for=40),
        partial(GenieM, range=MinMax(), lr=0.05, step_lr=1e-3),
        partial(SignRound, range=MinMax(), lr=0.5, clip_lr=0.5),
    ],
)
def test_every_rounding_equals_a_plain_loop_bit_for_bit(weight: Any) -> None:
    x = images(10)
    one, other = (student_of(resnet8(), x, weight=weight) for _ in range(2))
    learn(one, x, drop=0.5, rates_stated_for=20)
    plain_loop(other, x, iterations=5, batch_size=4, drop=0.5, seed=3, rates_stated_for=20)
    assert same(one.student, other.student)


@pytest.mark.parametrize(("granularity", "merges"), [("merged", 2), ("stage", 1), ("network", 1)])
def test_larger_units_equal_a_plain_loop_bit_for_bit(granularity: Granularity, merges: int) -> None:
    x = images(10)
    one, other = (student_of(resnet8(), x) for _ in range(2))
    learn(one, x, drop=0.5, granularity=granularity, merges=merges)
    plain_loop(other, x, iterations=5, batch_size=4, drop=0.5, seed=3, granularity=granularity, merges=merges)
    assert same(one.student, other.student)


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("parallel", [False, True])
def test_two_phases_equal_two_plain_loops_bit_for_bit(parallel: bool, drop: float) -> None:
    """BRECQ's published order: all weights with float activations, then all steps behind rounded weights."""
    x = images(10)
    one, other = (student_of(resnet8(), x) for _ in range(2))
    schedule = "parallel" if parallel else "sequential"
    learn(one, x, drop=drop, phases="weights_then_activations", activation_iterations=3, schedule=schedule)
    for phase, iterations in (("weights", 5), ("activations", 3)):
        plain_loop(other, x, iterations=iterations, batch_size=4, drop=drop, seed=3, parallel=parallel, phase=phase)
    assert same(one.student, other.student)


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("parallel", [False, True])
def test_layers_and_their_biases_equal_a_plain_loop_bit_for_bit(parallel: bool, drop: float) -> None:
    """AdaQuant's own unit; beside a residual branch a unit hands on more than its own output."""
    x = images(10)
    weight = partial(AdaQuant, range=MinMax(), weight_lr=0.05)
    one, other = (student_of(resnet8(), x, weight=weight) for _ in range(2))
    chosen: dict[str, Any] = {"granularity": "layer", "bias_lr": 1e-2, "drop": drop}
    learn(one, x, bias_relative=False, schedule="parallel" if parallel else "sequential", **chosen)
    plain_loop(other, x, iterations=5, batch_size=4, seed=3, parallel=parallel, **chosen)
    assert same(one.student, other.student)


@pytest.mark.parametrize("objective", ["fisher", "pd"])
def test_objectives_are_float32_under_autocast(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(6)
    seen: set[torch.dtype] = set()
    kind = type(OBJECTIVES[objective])
    errors = kind.errors

    def watched(self: Any, cache: Any, outputs: Any, index: Any) -> Tensor:
        found = errors(self, cache, outputs, index)
        seen.add(found.dtype)
        return found

    monkeypatch.setattr(kind, "errors", watched)
    module = learn(
        student_of(resnet8(), x),
        x,
        iterations=2,
        objective=OBJECTIVES[objective],
        trainer={"precision": "bf16-mixed"},
    )
    assert seen == {torch.float32}
    assert all(math.isfinite(row["error_hard"]) for row in module.results)


def test_a_barebones_trainer_without_callbacks_gives_the_same_numbers() -> None:
    x = images(8)
    one, other = student_of(resnet8(), x), student_of(resnet8(), x)
    learn(one, x)
    module, datamodule = build_reconstruction(conversion=other, images=x, **SETTINGS)
    needed = {
        k: v for k, v in module.trainer_arguments().items() if k not in ("num_sanity_val_steps", "log_every_n_steps")
    }
    pl.Trainer(accelerator="cpu", devices=1, barebones=True, **needed).fit(module, datamodule=datamodule)
    assert same(one.student, other.student)


def test_learning_beats_nearest_rounding_and_ends_hard() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(*(m for _ in range(2) for m in (nn.Linear(12, 12), nn.ReLU())), nn.Linear(12, 5)).eval()
        x = torch.randn(64, 12).relu()
    conversion = student_of(network, x, weight=partial(AdaRound, range=MinMax(), lr=0.1))
    module = learn(
        conversion, x, granularity="block", iterations=300, drop=0.0, regularizer_weight=100.0, batch_size=16
    )
    assert [row["unit"] for row in module.results] == ["0", "2", "4"]
    for row in module.results[1:2]:
        assert row["error_hard"] < 0.8 * row["error_nearest"]
        assert row["soft_fraction"] < 0.01
        assert row["error_hard"] == pytest.approx(row["error_soft"], rel=0.02)
    assert not any(p.requires_grad for p in conversion.student.parameters())
    with torch.no_grad():
        expected = (conversion.student(x) - conversion.reference(x)).square().sum(1).mean()
        power = conversion.reference(x).square().sum(1).mean()
    assert module.results[-1]["error_hard"] == pytest.approx(float(expected / power), rel=1e-4)


def test_undecided_roundings_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    x = images(8)
    module = learn(student_of(resnet8(), x), x, iterations=1)
    assert module.results[1]["soft_fraction"] > 0.5
    assert "undecided" in caplog.text


def test_entry_error_is_that_of_nearest_rounding() -> None:
    x = images(8)
    weight = partial(Nearest, range=MinMax())
    module = learn(student_of(resnet8(), x), x, iterations=1, granularity="network", drop=0.0)
    nearest = student_of(resnet8(), x, weight=weight, activation=partial(NearestActivation, range=MinMax()))
    with torch.no_grad():
        y = nearest.reference(x)
        error = (nearest.student(x) - y).square().sum(1).mean() / y.square().sum(1).mean()
    assert module.results[0]["error_nearest"] == pytest.approx(float(error), rel=1e-5)


def test_phases_learn_weights_first_and_activations_then() -> None:
    x = images(8)
    conversion = student_of(resnet8(), x)
    module, datamodule = build_reconstruction(
        conversion=conversion, images=x, **(SETTINGS | {"phases": "weights_then_activations", "drop": 0.0})
    )
    steps = {name: q.scale.item() for name, q in quantizers_of(conversion.student) if isinstance(q, LSQ)}

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch < 5:
                assert not any(site.enabled for _, site in sites(conversion.student))
                assert all(conversion.student.get_submodule(n).scale.item() == s for n, s in steps.items())
            else:
                assert all(site.enabled for _, site in sites(conversion.student))

    trainer_of(module, callbacks=[Watch()]).fit(module, datamodule=datamodule)
    assert [row["phase"] for row in module.results] == ["weights"] * 5 + ["activations"] * 4
    assert any(conversion.student.get_submodule(n).scale.item() != s for n, s in steps.items())


def test_nothing_to_learn_has_no_work_and_leaves_a_hard_student() -> None:
    x = images(8)
    conversion = student_of(
        resnet8(), x, weight=partial(Nearest, range=MinMax()), activation=partial(NearestActivation, range=MinMax())
    )
    module, _ = build_reconstruction(conversion=conversion, images=x, **SETTINGS)
    assert not module.has_work
    soft = student_of(resnet8(), x)
    none, _ = build_reconstruction(conversion=soft, images=x, **(SETTINGS | {"phases": "none"}))
    assert not none.has_work
    assert none.results == []
    assert all(q.soft_fraction() == 0.0 for _, q in quantizers_of(soft.student))


@pytest.mark.parametrize("granularity", ["layer", "stage"])
def test_other_granularities_learn_every_layer(granularity: str) -> None:
    x = images(9)
    conversion = student_of(resnet8(), x)
    before = {name: q.V.clone() for name, q in quantizers_of(conversion.student) if isinstance(q, AdaRound)}
    module = learn(conversion, x, granularity=granularity, phases="weights_then_activations", iterations=3)
    after = {name: q.V for name, q in quantizers_of(conversion.student) if isinstance(q, AdaRound)}
    assert len(before) == 8
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(math.isfinite(row["error_hard"]) for row in module.results)


def test_a_single_image_and_a_free_weight_with_biases() -> None:
    x = images(1)
    conversion = student_of(resnet8(), images(8), weight=partial(AdaQuant, range=MinMax()))
    bias = conversion.student.get_submodule("layer1.0.conv1").bias.clone()
    module = learn(conversion, x, bias_lr=1e-2, bias_relative=False)
    assert len(module.results) == 5
    assert not torch.equal(conversion.student.get_submodule("layer1.0.conv1").bias, bias)


def test_held_out_images_are_measured_but_not_learned_from() -> None:
    x = images(10)
    one, other = student_of(resnet8(), x), student_of(resnet8(), x)
    module = learn(one, x, holdout=0.3)
    changed = x.clone()
    changed[module.measurement.held] = 7.0
    again = learn(other, changed, holdout=0.3)
    assert same(one.student, other.student)
    assert len(module.measurement.held) == 3
    assert module.results[0]["error_hard_holdout"] != again.results[0]["error_hard_holdout"]


def test_sites_and_switches_are_restored_after_an_exception() -> None:
    x = images(8)
    conversion = student_of(resnet8(), x)
    with pytest.raises(InterruptedError):
        learn(conversion, x, trainer={"callbacks": [KillAndWatch(7, -1)]}, phases="weights_then_activations")
    for _, site in sites(conversion.student):
        assert site.enabled
        assert not site.training
        assert site.drop == 0.0
        assert site.generator is None


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("iterations", 0, "iterations"),
        ("batch_size", 0, "batch_size"),
        ("drop", 1.0, "drop"),
        ("phases", "later", "phases"),
        ("granularity", "row", "granularity"),
        ("normalization", "mean", "normalization"),
        ("regularizer_weight", -1.0, "regularizer_weight"),
        ("regularizer_weight", 0.0, "regularizer_weight: expected more than 0 for AdaRound"),
        ("schedule", "random", "schedule"),
        ("forward_batch_size", 0, "forward_batch_size: expected at least 1 image, got 0"),
        ("bias_lr", -1.0, "lr: expected finite learning rates .* got -1.* reconstruction.bias_lr"),
        ("rates_stated_for", -5, "rates_stated_for: expected at least 1 step, or null, got -5"),
        ("share", (0, 2), "schedule=parallel"),
        ("share", (2, 2), "0 <= i < n"),
    ],
)
def test_wrong_arguments_are_refused_by_name(argument: str, value: Any, match: str) -> None:
    conversion = student_of(resnet8(), images(4))
    with pytest.raises(ValueError, match=match):
        build_reconstruction(conversion=conversion, images=images(4), **(SETTINGS | {argument: value}))


@pytest.mark.parametrize(
    ("quantizers", "match"),
    [
        ({"weight": partial(AdaRound, range=MinMax(), lr=-1.0)}, "got -1.0 for .* 'rounding'; see weight"),
        ({"weight": partial(FlexRound, range=MinMax(), stated_for=0)}, "stated_for: expected at least 1 step"),
        ({"activation": partial(LSQ, range=MinMax(), lr=math.nan)}, "lr: expected finite .* got nan"),
    ],
)
def test_rates_that_no_optimizer_takes_are_refused(quantizers: dict[str, Any], match: str) -> None:
    conversion = student_of(resnet8(), images(4), **quantizers)
    with pytest.raises(ValueError, match=match):
        build_reconstruction(conversion=conversion, images=images(4), **SETTINGS)


@pytest.mark.slow
def test_two_processes_share_the_batch_and_agree(tmp_path: Path) -> None:
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "tests.lightning_modules.two_processes", str(tmp_path), processes]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    alone, *both = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], value, rtol=1e-3, atol=1e-3)
