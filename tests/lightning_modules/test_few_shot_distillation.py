"""Real images beside generated ones: their labels and views, the classes that are trusted, what is added to them."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.few_shot import FewShot
from reconstruction.schedules import index_batches, seed_of
from synthesis.class_alignment import ClassAlignment
from synthesis.seeding import seeded
from synthesis.statistics import execution_order
from synthesis.views import RandomResizedCrop, View
from tests.lightning_modules.distillation_runs import (
    FDDA,
    LABELS,
    SHOTS,
    SIZE,
    build,
    generator,
    state,
    trainer,
)
from tests.reconstruction.students import images, resnet8


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return resnet8()


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
            few.terms(made, epoch, step, 4 * epoch)
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
    terms = few.terms(made, 2, 1, 9)
    assert set(terms) == {"central", "class_cross_entropy"}
    torch.testing.assert_close(terms["central"], torch.stack(distances).mean(), rtol=1e-3, atol=1e-5)
    expected = 0.5 * F.cross_entropy(logits, torch.full((4,), label))
    torch.testing.assert_close(terms["class_cross_entropy"], expected, rtol=1e-4, atol=1e-5)


def keep(found: list[Tensor], module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    found.append(arguments[0])


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


def test_added_images_are_finished_as_the_generator_says(teacher: nn.Module) -> None:
    class Half(View):
        def __call__(self, images: Tensor, rng: torch.Generator, step: int = 0) -> Tensor:
            return images / 2

    halved = build(teacher, warmup=3, added_images=8, generator=functools.partial(generator, finalize=Half()), **FDDA)
    plain = build(teacher, warmup=3, added_images=8, **FDDA)
    assert torch.equal(halved.generated(8), plain.generated(8) / 2)
