"""Generator and student in turn are a plain loop, a warm-up leaves the student alone, and a run resumes bit by bit."""

from __future__ import annotations

import functools
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

from lightning_modules.distillation import DistillationModule, Turns
from lightning_modules.few_shot import FewShot
from lightning_modules.fine_tuning import build_distillation
from quantizers.layer import quantized_layers, quantizers_of
from quantizers.moving_average import MovingAverage
from reconstruction.inundation import Inundation
from reconstruction.learner import learning_rate
from reconstruction.schedules import index_batches, seed_of
from reconstruction.student_loss import StudentLoss
from synthesis.class_alignment import ClassAlignment
from synthesis.seeding import seeded
from synthesis.statistics import batch_norms, execution_order
from synthesis.views import RandomResizedCrop, View
from tests.configuration import CONF
from tests.lightning_modules.test_synthesis_options import COMPILED
from tests.lightning_modules.training import Interrupt, InterruptAt, quiet_trainer
from tests.reconstruction.students import images, resnet8, student_of
from tests.reconstruction.test_learner import MOVING, TRAINED

SIZE = (1, 8, 8)
SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3])
SHOTS = functools.partial(
    FewShot, batch_size=3, class_batch=4, untrusted_epochs=1, alignment=ClassAlignment, view=RandomResizedCrop()
)
FDDA: dict[str, Any] = {"few_shot": SHOTS, "view": RandomResizedCrop(probability=1.0), "images": images(11, seed=5)}
AIT: dict[str, Any] = {"loss": StudentLoss(cross_entropy=0.0), "inundation": Inundation(0.02)}
IMAGES: dict[str, Any] = {"generator": None, "warmup": 0, "few_shot": functools.partial(FewShot, batch_size=5)}


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return resnet8()


@functools.cache
def gdfq() -> Any:
    return OmegaConf.load(CONF / "generator" / "gdfq.yaml")


def generator(**arguments: Any) -> Any:
    return instantiate(gdfq())(**(arguments | {"batch_size": 6}))


def build(teacher: nn.Module, **changes: Any) -> DistillationModule:
    student = student_of(teacher, images(13), bits=(3, 4), weight=TRAINED, activation=MOVING)
    arguments: dict[str, Any] = {
        "images": images(11, seed=5),
        "labels": LABELS,
        "seed": 3,
        "epochs": 3,
        "warmup": 1,
        "steps": 4,
        "range_epochs": 1,
        "optimizer": SGD,
        "loss": StudentLoss(),
        "generator": generator,
    }
    return build_distillation(conversion=student, teacher=teacher, input_size=SIZE, **(arguments | changes))


def trainer(module: DistillationModule, **changes: Any) -> pl.Trainer:
    return quiet_trainer(**(module.trainer_arguments() | changes))


def fitted(teacher: nn.Module, **changes: Any) -> DistillationModule:
    module = build(teacher, **changes)
    trainer(module).fit(module)
    return module


def state(module: DistillationModule) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def observe(student: nn.Module, observing: bool) -> None:
    for _, quantizer in quantizers_of(student):
        if isinstance(quantizer, MovingAverage):
            quantizer.observing = observing


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


@pytest.mark.parametrize(("step", "changes"), [(2, {}), (6, {}), (8, FDDA), (7, AIT), (5, IMAGES)])
def test_resumed_run_is_bitwise_the_uninterrupted_run(
    teacher: nn.Module, tmp_path: Path, step: int, changes: dict[str, Any]
) -> None:
    whole = fitted(teacher, **changes)
    path = tmp_path / "distillation.ckpt"
    stopped, resumed = build(teacher, **changes), build(teacher, **changes)
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[SaveAt(step, path), InterruptAt(step)]).fit(stopped)
    torch.manual_seed(99)
    trainer(resumed).fit(resumed, ckpt_path=path)
    expected = state(whole)
    assert all(torch.equal(value, expected[key]) for key, value in state(resumed).items())
    assert resumed.facts == whole.facts


def test_checkpoints_hold_neither_teacher_nor_real_images(teacher: nn.Module) -> None:
    module = fitted(teacher, **FDDA)
    rooms = {key.split(".")[0] for key in module.state_dict()}
    assert rooms == {"student", "generator", "losses", "first", "best"}
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


def test_real_images_stand_beside_generated_ones_with_their_own_labels(teacher: nn.Module) -> None:
    module = build(teacher, few_shot=functools.partial(FewShot, batch_size=3, view=None))
    shots = module.few_shot
    assert shots is not None
    shots.place(torch.device("cpu"), teacher, None)
    draft = module.generator.draft(1, 2)  # type: ignore[union-attr]
    lesson = module._lesson(draft, 1, 2, done=2)
    index = index_batches(11, 3, 8, seed=seed_of(3, "few_shot"))[2]
    assert torch.equal(lesson.images[:6], draft.seen)
    assert torch.equal(lesson.images[6:], images(11, seed=5)[index])
    assert lesson.labels[6:].argmax(1).tolist() == LABELS[index].tolist()
    torch.testing.assert_close(lesson.targets, teacher(lesson.images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("viewed", [False, True])
def test_the_student_sees_views_and_its_targets_are_the_teachers_of_these(
    teacher: nn.Module, viewed: bool, real: bool
) -> None:
    view = RandomResizedCrop(scale=(0.5, 0.6), probability=1.0)
    shots = functools.partial(FewShot, batch_size=3, view=view) if real else None
    module = build(teacher, few_shot=shots, view=view if viewed else None)
    if module.few_shot is not None:
        module.few_shot.place(torch.device("cpu"), teacher, None)
    draft = module.generator.draft(1, 2)  # type: ignore[union-attr]
    batches: list[int] = []
    handle = teacher.register_forward_hook(lambda _, arguments, output: batches.append(len(arguments[0])))
    lesson = module._lesson(draft, 1, 2, done=2)
    handle.remove()
    assert batches == ([6 * viewed + 3 * real] if viewed or real else [])  # each image once, of what is not known yet
    seen = draft.seen.detach()
    expected = [view(seen, seeded(3, "student_view", 1, 2), 2) if viewed else seen]
    if real:
        index = index_batches(11, 3, 8, seed=seed_of(3, "few_shot"))[2]
        expected.append(view(images(11, seed=5)[index], seeded(3, "real", 1, 2), 2))
        assert not torch.equal(expected[1], images(11, seed=5)[index])
    assert torch.equal(lesson.images, torch.cat(expected))
    assert torch.equal(lesson.images[:6], seen) is not viewed
    torch.testing.assert_close(lesson.targets, teacher(lesson.images), rtol=1e-4, atol=1e-4)


def test_classes_that_the_teacher_mistakes_are_made_in_the_first_epochs_alone(teacher: nn.Module) -> None:
    module = build(teacher, **FDDA)
    few, made = module.few_shot, module.generator
    assert few is not None
    assert made is not None
    few.place(torch.device("cpu"), teacher, made.alignment)
    right = teacher(images(11, seed=5)).argmax(1) == LABELS
    trusted = set(LABELS[right].tolist())
    assert 0 < len(trusted) < 10
    drawn: dict[int, set[int]] = {}
    for epoch in (0, 1):
        asked: list[int] = []
        handle = made.source.register_forward_pre_hook(
            lambda _, arguments, asked=asked: asked.append(int(arguments[1][0].argmax()))
        )
        for step in range(60):
            few.terms(made, epoch, step)
        handle.remove()
        drawn[epoch] = set(asked)
    assert drawn[0] == set(range(10))
    assert drawn[1] == trusted


def test_a_class_batch_is_of_one_class_against_its_own_centre(teacher: nn.Module) -> None:
    """C and CE by hand: F.batch_norm's moments of the class's image and of the generated batch, deep layers only."""
    shots = functools.partial(SHOTS, alignment=functools.partial(ClassAlignment, central=1.0, distorted=0.0))
    module = build(teacher, **(FDDA | {"few_shot": shots}))
    made, few = module.generator, module.few_shot
    assert made is not None
    assert few is not None
    few.place(torch.device("cpu"), teacher, made.alignment)
    assert few.alignment is not None
    right = teacher(images(11, seed=5)).argmax(1) == LABELS
    trusted = sorted(set(LABELS[right].tolist()))
    assert trusted
    rng = seeded(3, "class", 2, 1)
    label = trusted[int(torch.randint(len(trusted), (), generator=rng))]
    x = made.source(rng, F.one_hot(torch.full((4,), label), 10).float())
    of_class = (label == LABELS) & right
    names = list(execution_order(teacher, SIZE))
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        teacher.get_submodule(name).register_forward_pre_hook(functools.partial(keep, seen[name])) for name in names
    ]
    logits = teacher(x)
    teacher(images(11, seed=5)[of_class])
    for handle in handles:
        handle.remove()
    distances = []
    for name in names[(len(names) + 1) // 2 - 2 :]:
        one, other = ((t.mean((0, 2, 3)), t.var((0, 2, 3), correction=0)) for t in seen[name])
        distances.append(sum(F.mse_loss(a, b) for a, b in zip(one, other, strict=True)))
    terms = few.terms(made, 2, 1)
    assert set(terms) == {"central", "class_cross_entropy"}
    torch.testing.assert_close(terms["central"], torch.stack(distances).mean(), rtol=1e-3, atol=1e-5)
    expected = 0.5 * F.cross_entropy(logits, torch.full((4,), label))
    torch.testing.assert_close(terms["class_cross_entropy"], expected, rtol=1e-4, atol=1e-5)


def keep(found: list[Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    found.append(arguments[0])


def test_a_panel_has_a_row_for_each_class_and_changes_nothing(teacher: nn.Module) -> None:
    module = build(teacher)
    before = state(module)
    assert torch.equal(module.panel(2), module.panel(2))
    assert module.panel(2).shape == (20, *SIZE)
    assert all(torch.equal(value, before[key]) for key, value in state(module).items())


def test_images_of_a_generator_alone_leave_the_student_as_it_was(teacher: nn.Module) -> None:
    module = build(teacher, warmup=3, added_images=8, **FDDA)
    before = state(module)
    trainer(module).fit(module)
    after = state(module)
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("student."))
    assert any(not torch.equal(after[key], before[key]) for key in before if key.startswith("generator."))
    x = module.generated(8)
    assert x.shape == (8, *SIZE)
    labels = F.one_hot(torch.randint(10, (6,), generator=seeded(3, "image_labels", 6)), 10).float()
    assert module.generator is not None
    assert torch.equal(x[6:], module.generator.source(seeded(3, "images", 6), labels)[:2])


def test_the_progress_bar_names_epoch_and_losses(teacher: nn.Module) -> None:
    module, labels = build(teacher), []

    class Read(Callback):
        def on_train_start(self, *arguments: Any) -> None:
            labels.append(module.progress_label)

        on_train_batch_end = on_train_end = on_train_start

    trainer(module, callbacks=[Read()]).fit(module)
    losses = [float(loss) / 4 for loss in module.losses]
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


def test_added_images_are_finished_as_the_generator_says(teacher: nn.Module) -> None:
    class Half(View):
        def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
            return images / 2

    halved = build(teacher, warmup=3, added_images=8, generator=functools.partial(generator, finalize=Half()), **FDDA)
    plain = build(teacher, warmup=3, added_images=8, **FDDA)
    assert torch.equal(halved.generated(8), plain.generated(8) / 2)


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
    ],
)
def test_what_does_not_go_together_is_named(teacher: nn.Module, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(teacher, **changes)


def test_turns_count_the_students_steps() -> None:
    assert Turns(epochs=400, warmup=50).student_steps == 70_000
