"""Generator and student in turn are a plain loop, a warm-up leaves the student alone, and a run resumes bit by bit."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from lightning_modules.distillation import DistillationModule
from lightning_modules.turns import Turns
from quantizers.layer import quantized_layers, quantizers_of
from quantizers.moving_average import MovingAverage
from reconstruction.learner import learning_rate
from reconstruction.student_loss import StudentLoss
from synthesis.guidance import Competition
from synthesis.seeding import seeded
from synthesis.statistics import batch_norms
from synthesis.surgery import SwingConvolution
from tests.configuration import CONF
from tests.lightning_modules.distillation_runs import (
    AIT,
    FDDA,
    IMAGES,
    SGD,
    SHOTS,
    SIZE,
    build,
    fitted,
    generator,
    observe,
    state,
    trainer,
)
from tests.lightning_modules.test_synthesis_options import COMPILED
from tests.lightning_modules.training import Interrupt, InterruptAt
from tests.reconstruction.students import images, resnet8


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return resnet8()


def alignment_loss(teacher: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """CE(T(x), y) + 0.1 (1/L) sum_l [ MSE(m, mu) + MSE(v, sigma^2) ], with hooks of our own."""
    found: list[Tensor] = []

    def look(module: Any, arguments: tuple[Tensor, ...]) -> None:
        entered = arguments[0]
        mean, var = entered.mean((0, 2, 3)), entered.var((0, 2, 3), correction=0)
        found.append(F.mse_loss(mean, module.running_mean) + F.mse_loss(var, module.running_var))

    norms = batch_norms(teacher)
    handles = [norms[name].register_forward_pre_hook(look) for name in norms]
    logits = teacher(x)
    for handle in handles:
        handle.remove()
    return F.cross_entropy(logits, labels) + 0.1 * torch.stack(found).mean()


def test_agrees_with_a_plain_loop(teacher: nn.Module) -> None:
    module = fitted(teacher)
    draws = build(teacher)  # for the source's parameters and nothing else
    source = draws.generator.source  # type: ignore[union-attr]
    adam = torch.optim.Adam(source.parameters(), lr=1e-3, betas=(0.5, 0.999))
    student = draws.student.eval()
    learned = [p for p in student.parameters() if p.requires_grad]
    sgd = SGD(learned)
    for epoch in range(3):
        for step in range(4):
            total = 4 * epoch + step
            classes = torch.randint(10, (6,), generator=seeded(3, "labels", epoch, step))
            labels = F.one_hot(classes, 10).float()
            x = source(seeded(3, "latent", epoch, step), labels)
            adam.param_groups[0]["lr"] = 1e-3 * 0.1 ** (total * 4 // 12)
            adam.zero_grad()
            alignment_loss(teacher, x, labels).backward()
            adam.step()
            if epoch == 0:
                continue
            observe(student, epoch == 1)
            with torch.no_grad():
                targets = teacher(x.detach())
            sgd.param_groups[0]["lr"] = 0.01 * learning_rate("cosine", total - 4, 8)
            logits = student(x.detach())
            p, q = (targets / 20).softmax(1), (logits / 20).log_softmax(1)
            loss = 400 * (p * (p.log() - q)).mean() + F.cross_entropy(logits, labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    for _, quantizer in quantizers_of(student):
        quantizer.harden()
    observe(student, False)
    expected = draws.state_dict()
    # biases before a normalisation have no gradient but rounding, which Adam enlarges: images tell
    torch.testing.assert_close(module.panel(2), draws.panel(2), rtol=1e-2, atol=1e-3)
    for key, value in module.state_dict().items():
        if key.startswith("student."):
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def test_only_the_generator_learns_in_the_warm_up(teacher: nn.Module) -> None:
    module = build(teacher, epochs=2, warmup=1)
    before = state(module)
    with pytest.raises(RuntimeError, match="expected 8 steps, got 4"):
        trainer(module, max_epochs=1).fit(module)
    after = state(module)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any(key.startswith("generator.source") for key in changed)
    learned = {key for key in changed if key.startswith("student.") and "weight_quantizer" not in key}
    assert not learned
    fresh = build(teacher, epochs=2, warmup=1).student
    for _, quantizer in quantizers_of(fresh):
        quantizer.harden()
    assert torch.equal(fresh(images(4)), module.student(images(4)))


def test_ranges_move_after_the_warm_up_and_then_stay(teacher: nn.Module) -> None:
    def scales(module: DistillationModule) -> list[float]:
        return [float(q.scale) for _, q in quantizers_of(module.student) if isinstance(q, MovingAverage)]

    calibrated = scales(build(teacher))
    assert scales(fitted(teacher, range_epochs=0)) == calibrated
    once = scales(fitted(teacher, range_epochs=1))
    assert all(a != b for a, b in zip(once, calibrated, strict=True))
    assert scales(fitted(teacher, range_epochs=2)) != once


def test_one_batch_is_one_global_step(teacher: nn.Module) -> None:
    module = build(teacher)
    runner = trainer(module)
    runner.fit(module)
    assert runner.global_step == module.total_steps == 12
    assert module.facts["student_steps"] == 8


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("step", "changes"), [(2, {}), (6, {}), (8, FDDA), (7, AIT), (5, IMAGES), (12, {})])
def test_resumed_run_is_bitwise_the_uninterrupted_run(
    teacher: nn.Module, tmp_path: Path, step: int, changes: dict[str, Any]
) -> None:
    whole = fitted(teacher, **changes)
    path = tmp_path / "distillation.ckpt"
    stopped, resumed = build(teacher, **changes), build(teacher, **changes)
    with pytest.raises(Interrupt) if step < whole.total_steps else nullcontext():  # behind the last nothing starts
        trainer(stopped, callbacks=[SaveAt(step, path), InterruptAt(step)]).fit(stopped)
    torch.manual_seed(99)
    trainer(resumed).fit(resumed, ckpt_path=path)
    expected = state(whole)
    assert all(torch.equal(value, expected[key]) for key, value in state(resumed).items())
    assert resumed.facts == whole.facts


def test_checkpoints_hold_neither_teacher_nor_real_images(teacher: nn.Module) -> None:
    module = fitted(teacher, **FDDA)
    rooms = {key.split(".")[0] for key in module.state_dict()}
    assert rooms == {"student", "generator", "losses"}
    assert not any("network" in key for key in module.state_dict())


class WatchStudent(Callback):
    """What the student computes after each epoch, as deployed."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        quantizers = [q for _, q in quantizers_of(pl_module.student) if isinstance(q, MovingAverage)]
        observing = [quantizer.observing for quantizer in quantizers]
        observe(pl_module.student, False)
        with torch.no_grad():
            self.outputs.append(pl_module.student(images(4)))
        for quantizer, was in zip(quantizers, observing, strict=True):
            quantizer.observing = was


def test_the_last_step_is_the_result_and_the_best_epoch_a_number_beside_it(teacher: nn.Module) -> None:
    watch = WatchStudent()
    module = build(teacher, epochs=4, optimizer=functools.partial(torch.optim.SGD, lr=0.3), schedule="constant")
    trainer(module, callbacks=[watch]).fit(module)  # it gets worse
    best = module.facts["best_loss_epoch"]
    assert best < 3
    assert module.facts["best_loss"] < module.facts["loss_last_epoch"]
    torch.testing.assert_close(module.student(images(4)), watch.outputs[3])
    assert not torch.allclose(module.student(images(4)), watch.outputs[best])
    assert not any(p.requires_grad for p in module.student.parameters())


def test_the_student_learns_of_its_teacher(teacher: nn.Module) -> None:
    changes = {"epochs": 9, "steps": 12, "loss": StudentLoss(cross_entropy=0.0), "range_epochs": 0}
    module = fitted(teacher, **(IMAGES | changes))
    assert module.facts["loss_last_epoch"] < 0.6 * module.facts["loss_first_epoch"]
    for _, layer in quantized_layers(module.student):
        assert len(layer.quantized_weight()[0].unique()) <= 2**8


def test_a_panel_has_a_row_for_each_class_and_changes_nothing(teacher: nn.Module) -> None:
    module = build(teacher)
    before = state(module)
    assert torch.equal(module.panel(2), module.panel(2))
    assert module.panel(2).shape == (20, *SIZE)
    assert all(torch.equal(value, before[key]) for key, value in state(module).items())


def test_the_progress_bar_names_epoch_and_losses(teacher: nn.Module) -> None:
    module, labels = build(teacher), []

    class Read(Callback):
        def on_train_start(self, *arguments: Any) -> None:
            labels.append(module.progress_label)

        on_train_batch_end = on_train_end = on_train_start

    trainer(module, callbacks=[Read()]).fit(module)
    losses = [float(loss) / 4 for loss in module.losses.sums]
    assert labels[0] == "epoch 1/3 warm-up"
    assert labels[1].startswith("epoch 1/3 warm-up G ")
    assert "S" not in labels[4]
    assert labels[5].startswith("epoch 2/3 G ")
    assert labels[12] == labels[13] == f"epoch 3/3 G {losses[0]:.3g} S {losses[1]:.3g}"


@COMPILED
def test_the_pass_of_generated_images_is_compiled_if_asked(teacher: nn.Module) -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(1)
            return graph.forward(*arguments)

        return run

    plain = fitted(teacher)
    other = fitted(teacher, generator=functools.partial(generator, compile=backend))
    assert len(calls) == 12
    assert torch.equal(other.panel(2), plain.panel(2))


def test_targets_are_the_teachers_own_whatever_the_generator_does_to_it(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(teacher, generator=functools.partial(generator, surgery=SwingConvolution()))
    lessons: list[Any] = []
    lesson_of = module._lesson
    monkeypatch.setattr(module, "_lesson", lambda *now: (lessons.append(lesson_of(*now)), lessons[-1])[1])
    trainer(module).fit(module)
    assert len(lessons) == 8
    with torch.no_grad():
        for lesson in lessons:
            torch.testing.assert_close(teacher(lesson.images), lesson.targets)


def test_ranges_are_observed_once_a_step_also_where_the_generator_looks_at_the_student(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[bool] = []
    observe_one = MovingAverage.observe
    monkeypatch.setattr(MovingAverage, "observe", lambda self, x: (observed.append(True), observe_one(self, x))[1])
    guidance = {"competition": Competition(1.0)}
    module = build(teacher, generator=functools.partial(generator, guidance=guidance))
    averages = [q for _, q in quantizers_of(module.student) if isinstance(q, MovingAverage)]
    assert module.compares_students
    trainer(module).fit(module)
    assert len(observed) == 4 * len(averages)  # range_epochs=1, of four steps


def test_the_generators_step_computes_no_gradients_of_the_student(teacher: nn.Module) -> None:
    module = build(teacher, generator=functools.partial(generator, guidance={"competition": Competition(1.0)}))
    during: list[bool] = []

    class Watch(Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
            during.append(any(parameter.grad is not None for parameter in module.learner.parameters()))

    trainer(module, callbacks=[Watch()]).fit(module)
    assert during[:4] == [False] * 4  # the warm-up: the generator's steps alone
    assert any(during)


def test_a_training_of_no_step_is_no_result(teacher: nn.Module) -> None:
    module = build(teacher)
    fit = trainer(module, limit_train_batches=0)
    fit.fit(module)  # calls no hook at the end
    with pytest.raises(RuntimeError, match="distillation: expected 12 steps, got 0"):
        module.expect_complete(fit.global_step)


@pytest.mark.parametrize("cut", [{"max_steps": 9}, {"limit_train_batches": 2}])
def test_a_training_that_is_cut_short_is_no_result(teacher: nn.Module, cut: dict[str, int]) -> None:
    module = build(teacher)
    with pytest.raises(RuntimeError, match="distillation: expected 12 steps, got"):
        trainer(module, **cut).fit(module)


def test_divergence_is_named(teacher: nn.Module) -> None:
    module = build(teacher, optimizer=functools.partial(torch.optim.SGD, lr=1e38))
    with pytest.raises(RuntimeError, match="distillation: expected finite losses in epoch"):
        trainer(module).fit(module)


def pixels(**arguments: Any) -> Any:
    return instantiate(OmegaConf.load(CONF / "generator" / "zeroq.yaml"))(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": None}, "generator: expected one, or real images"),
        ({"generator": functools.partial(generator, early_stop=9)}, "generator.early_stop: expected null, .* got 9"),
        ({"generator": pixels}, "makes new images at every step, got Pixels"),
        ({"warmup": 4}, "no more epochs of warm-up than epochs"),
        ({"warmup": 3}, "added_images, warmup: expected"),
        ({"added_images": 8}, "added_images, warmup: expected"),
        (FDDA | {"labels": None}, "labels: expected the class of every image"),
        (IMAGES | {"labels": None}, "loss.cross_entropy: expected 0"),
        (FDDA | {"images": torch.zeros(0, *SIZE)}, "images: expected at least one"),
        (FDDA | {"few_shot": functools.partial(SHOTS, untrusted=-1)}, "untrusted: expected .* got 0.5 and -1"),
        (FDDA | {"few_shot": functools.partial(SHOTS, cross_entropy=-1)}, "cross_entropy, .* got -1 and 0.25"),
    ],
)
def test_what_does_not_go_together_is_named(teacher: nn.Module, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(teacher, **changes)


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_the_teacher_does_not_know_are_refused(teacher: nn.Module, label: int) -> None:
    module = build(teacher, labels=torch.full((11,), label), **IMAGES)
    with pytest.raises(ValueError, match="labels: expected at least one, from 0 to 9, got 11"):
        trainer(module).fit(module)


def test_turns_count_the_students_steps() -> None:
    assert Turns(epochs=400, warmup=50).student_steps == 70_000
