from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from callbacks.checkpoint import StageCheckpoint
from lightning_modules.block_reconstruction import BlockReconstructionModule
from lightning_modules.job import SAFE_LOADING
from lightning_modules.reconstruction import build_reconstruction
from quantizers.adaquant import AdaQuant
from quantizers.adaround import AdaRound
from quantizers.convert import Conversion
from quantizers.layer import ActivationSite, QuantizedLayer, quantizers_of, sites
from quantizers.lsq import LSQ
from quantizers.nearest import Nearest, NearestActivation
from quantizers.qdrop import qdrop
from quantizers.ranges import MinMax
from reconstruction.extract import extract
from reconstruction.fisher import DiagonalFisher
from reconstruction.objectives import PowerError
from reconstruction.partition import partition
from reconstruction.prediction_difference import PredictionDifference
from reconstruction.schedules import index_batches, seed_of
from tests.reconstruction.students import images, resnet8, student_of

SETTINGS: dict[str, Any] = {
    "iterations": 5,
    "batch_size": 4,
    "forward_batch_size": 16,
    "regularizer_weight": 0.1,
    "seed": 3,
}


def trainer_of(module: BlockReconstructionModule, **arguments: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, **(quiet | module.trainer_arguments() | arguments))


def learn(conversion: Conversion, x: Tensor, *, trainer: dict[str, Any] | None = None, **arguments: Any) -> Any:
    module, datamodule = build_reconstruction(conversion=conversion, images=x, **(SETTINGS | arguments))
    trainer_of(module, **(trainer or {})).fit(module, datamodule=datamodule)
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def squared_error(y: Tensor, target: Tensor) -> Tensor:
    """Summed over channels, averaged over positions and then over images."""
    return (y - target).square().sum(1).view(len(y), -1).mean(1).mean()


def kl(teacher: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each image."""
    p, q = (teacher / temperature).log_softmax(1), (logits / temperature).log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def fisher_weights(z: Tensor, tail: Callable[[Tensor], Tensor], teacher: Tensor) -> Tensor:
    """Squared gradients of the divergence at `z`, of mean 1."""
    z = z.detach().requires_grad_()
    (g,) = torch.autograd.grad(kl(teacher, tail(z), 1.0).sum(), z)
    mean = g.double().square().flatten(1).sum(1).mean() / g[0].numel()
    return (g / float(mean.sqrt())).square()


def plain_loop(
    conversion: Conversion,
    x: Tensor,
    *,
    iterations: int,
    batch_size: int,
    drop: float,
    seed: int,
    objective: str = "mse",
    parallel: bool = False,
) -> None:
    """The oracle: blocks one after the other, an Adam and its schedules for each, nothing of Lightning."""
    x_q = x_fp = x
    generator = torch.Generator()
    units = partition(conversion.reference, "block")
    with torch.no_grad():
        logits = conversion.reference(x)
    for k, unit in enumerate(units):
        behind = [extract(conversion.reference, other) for other in units[k + 1 :]]
        student, teacher = extract(conversion.student, unit), extract(conversion.reference, unit)
        with torch.no_grad():
            target = teacher(x_fp)[0]

        def tail(z: Tensor, behind: list[fx.GraphModule] = behind) -> Tensor:
            for part in behind:
                (z,) = part(z)
            return z

        rounded = [m.weight_quantizer for m in student.modules() if isinstance(m, QuantizedLayer)]
        active = [m for m in student.modules() if isinstance(m, ActivationSite)]
        groups = [g for q in (*rounded, *(s.quantizer for s in active)) for g in q.parameter_groups()]
        if groups:
            nearest = copy.deepcopy(student)
            for _, quantizer in quantizers_of(nearest):
                quantizer.harden()
            with torch.no_grad():
                at_entry = nearest(x_q)[0]
            weights = fisher_weights(at_entry, tail, logits) if objective == "fisher" else torch.ones_like(target)

            def error_of(y: Tensor, index: Any, *, z: Tensor = target, w: Tensor = weights, tail: Any = tail) -> Tensor:
                if objective == "fisher":
                    return (w[index] * (y - z[index]).square()).sum(1).view(len(y), -1).mean(1).mean()
                if objective == "pd":
                    images = (y - z[index]).square().sum(1).view(len(y), -1).mean(1)
                    return (images + 10.0 * kl(logits[index], tail(y), 4.0)).mean()
                return squared_error(y, z[index])

            with torch.no_grad():
                entry = float(error_of(at_entry, slice(None)))
            optimizer = torch.optim.Adam([{"params": g["params"], "lr": g["lr"]} for g in groups])
            cosine = [g["anneal"] == "cosine" for g in groups]
            factors = [(lambda t, c=c: 0.5 * (1 + math.cos(math.pi * t / iterations)) if c else 1.0) for c in cosine]
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
            soft = [q for q in rounded if isinstance(q, AdaRound)]
            sizes = [q.V.numel() for q in soft]
            for t, index in enumerate(index_batches(len(x), batch_size, iterations, seed=seed_of(seed, "joint", k))):
                inputs = x_q[index]
                if drop:
                    generator.manual_seed(seed_of(seed, "joint", k, t, 0))
                    inputs = inputs if parallel else qdrop(inputs, x_fp[index], drop, generator)
                    for site in active:
                        site.train()
                        site.drop, site.generator = drop, generator
                error = error_of(student(inputs)[0], index) / entry
                penalty = sum(n / sum(sizes) * q.regularizer(t / iterations) for q, n in zip(soft, sizes, strict=True))
                optimizer.zero_grad()
                (error + 0.1 * penalty).backward()
                optimizer.step()
                schedule.step()
            for quantizer in (*rounded, *(s.quantizer for s in active)):
                quantizer.harden()
            for site in active:
                site.eval()
                site.drop, site.generator = 0.0, None
        with torch.no_grad():
            x_q, x_fp = target if parallel else student(x_q)[0], target


OBJECTIVES = {"mse": PowerError(), "fisher": DiagonalFisher(), "pd": PredictionDifference()}


@pytest.mark.parametrize(
    ("drop", "objective", "parallel", "weight"),
    [
        (0.0, "mse", False, None),
        (0.5, "mse", False, None),
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


class KillAndWatch(pl.Callback):
    """Save and raise after step `kill`; note parameters, Adam's moments and learning rates after step `watch`."""

    def __init__(self, kill: int | None, watch: int, path: Path | None = None) -> None:
        self.kill, self.watch, self.path = kill, watch, path
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.watch:
            parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            states = [v for p in parameters for v in trainer.optimizers[0].state.get(p, {}).values()]
            self.seen = [t.detach().clone() for t in (*parameters, *states)]
            self.seen += [torch.tensor([group["lr"] for group in trainer.optimizers[0].param_groups])]
        if trainer.global_step == self.kill:
            if self.path is not None:
                trainer.save_checkpoint(self.path)
            raise InterruptedError("killed")


@pytest.mark.parametrize(
    ("phases", "kill", "objective"),
    [
        *(("joint", kill, "mse") for kill in (3, 5, 25)),
        *(("weights_then_activations", kill, "mse") for kill in (8, 25, 28, 45)),
        *(("joint", kill, "fisher") for kill in (8, 10, 25)),
        ("weights_then_activations", 28, "fisher"),
        ("joint", 8, "pd"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, phases: str, kill: int, objective: str) -> None:
    x = images(10)
    arguments: dict[str, Any] = {"phases": phases, "activation_iterations": 5, "holdout": 0.2}
    arguments |= {"objective": OBJECTIVES[objective], "bias_lr": 1e-3}
    arguments |= {"drop": 0.5 if phases == "joint" else 0.0}
    whole = student_of(resnet8(), x)
    uninterrupted = KillAndWatch(None, kill + 1)
    expected = learn(whole, x, trainer={"callbacks": [uninterrupted]}, **arguments)

    killed = student_of(resnet8(), x)
    with pytest.raises(InterruptedError):
        learn(killed, x, trainer={"callbacks": [KillAndWatch(kill, -1, tmp_path / "last.ckpt")]}, **arguments)
    assert all(site.enabled and not site.training for _, site in sites(killed.student))

    resumed = student_of(resnet8(), x)
    module, datamodule = build_reconstruction(conversion=resumed, images=x, **(SETTINGS | arguments))
    after = KillAndWatch(None, kill + 1)
    trainer = trainer_of(module, callbacks=[after])
    trainer.fit(module, datamodule=datamodule, ckpt_path=tmp_path / "last.ckpt", **SAFE_LOADING)
    assert same(resumed.student, whole.student)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in m.results] for m in (module, expected)]
    assert rows[0] == rows[1]
    assert len(after.seen) == len(uninterrupted.seen)
    assert bool(after.seen) == (kill < module.total_steps)
    assert all(torch.equal(a, b) for a, b in zip(after.seen, uninterrupted.seen, strict=True))


class SaveAndKill(StageCheckpoint):
    """Write the stage's checkpoint after step `kill`, and raise."""

    def __init__(self, kill: int | None, folder: Path) -> None:
        super().__init__(str(folder))
        self.kill = kill

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.kill:
            self.save(trainer, pl_module)
            raise InterruptedError("killed")


@pytest.mark.parametrize("kills", [(2, 3), (4, 6), (1, 2, 3), (8, 9)])
def test_killed_again_after_it_was_resumed_equals_uninterrupted(tmp_path: Path, kills: Sequence[int]) -> None:
    x, short = images(10), {"iterations": 2, "drop": 0.5}
    whole = student_of(resnet8(), x)
    expected = learn(whole, x, **short)
    assert expected.total_steps == 10  # an epoch of two steps for each of five units
    checkpoint = tmp_path / "reconstruction.ckpt"
    for kill in (*kills, None):
        conversion = student_of(resnet8(), x)
        module, datamodule = build_reconstruction(conversion=conversion, images=x, **(SETTINGS | short))
        trainer = trainer_of(module, callbacks=[SaveAndKill(kill, tmp_path)])
        resumed = {"ckpt_path": checkpoint, **SAFE_LOADING} if checkpoint.exists() else {}
        with pytest.raises(InterruptedError) if kill else nullcontext():
            trainer.fit(module, datamodule=datamodule, **resumed)
    assert same(conversion.student, whole.student)


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
    module = learn(conversion, x, bias_lr=1e-2)
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
        ("schedule", "random", "schedule"),
        ("share", (0, 2), "schedule=parallel"),
        ("share", (2, 2), "0 <= i < n"),
    ],
)
def test_wrong_arguments_are_refused_by_name(argument: str, value: Any, match: str) -> None:
    conversion = student_of(resnet8(), images(4))
    with pytest.raises(ValueError, match=match):
        build_reconstruction(conversion=conversion, images=images(4), **(SETTINGS | {argument: value}))


@pytest.mark.slow
def test_two_processes_share_the_batch_and_agree(tmp_path: Path) -> None:
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "tests.lightning_modules.two_processes", str(tmp_path), processes]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    alone, *both = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], value, rtol=1e-3, atol=1e-3)
