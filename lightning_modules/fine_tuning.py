"""From `conf/distillation/*.yaml` to the fine-tuning stage, which stands in the place of reconstruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.sample_grid import save_grid
from datamodules.calibration import CalibrationImages
from lightning_modules.distillation import DistillationModule
from lightning_modules.few_shot import FewShot
from lightning_modules.generator import GeneratorModule
from lightning_modules.saved_runs import plain, stated
from lightning_modules.stored_synthesis import student_settings
from lightning_modules.turns import Turns
from networks.fingerprint import fingerprint
from networks.teachers import Teacher
from quantizers.convert import Conversion
from reconstruction.inundation import Inundation
from reconstruction.learner import Learned, Learner, Schedule, trained_weights
from reconstruction.student_loss import StudentLoss
from synthesis.store import SampleStore
from synthesis.views import View

if TYPE_CHECKING:
    from lightning_modules.job import Job

RECIPE_VERSION = 1  # raise it when the same settings add other images than before, by more than rounding
COLUMNS = 8  # of the picture: images a class


def build_distillation(
    *,
    conversion: Conversion,
    teacher: nn.Module,
    input_size: tuple[int, int, int],
    images: Tensor,
    labels: Tensor | None,
    seed: int,
    epochs: int,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer],
    loss: StudentLoss,
    generator: Callable[..., GeneratorModule] | None = None,
    warmup: int = 0,
    steps: int = 200,
    range_epochs: int = 0,
    learn: Sequence[Learned] = ("weights", "biases", "norms"),
    schedule: Schedule = "cosine",
    inundation: Inundation | None = None,
    few_shot: Callable[..., FewShot] | None = None,
    view: View | None = None,
    added_images: int = 0,
) -> DistillationModule:
    """Compose the fine-tuning of `conversion.student`; the parts are described at the classes that take them.

    `generator` is called as for images to calibrate on; its own number of steps gives way to that of the epochs.
    `few_shot` is called with images and labels, where they are to be used. With `added_images` only the generator
    learns, and that many of its images join those of the calibration.

    Raises:
        ValueError: if the parts do not go together.
    """
    turns = Turns(epochs=epochs, warmup=warmup, steps=steps, range_epochs=range_epochs)
    expect_purpose(turns, added_images)
    made = None
    if generator is not None:
        made = generator(
            network=teacher,
            input_size=input_size,
            count=1,  # it is asked for images at every step instead
            seed=seed,
            steps=turns.total_steps,
            student=lambda: conversion.student,
        )
    real = None
    if few_shot is not None:
        lengths = {"steps": max(turns.student_steps, 1), "total_steps": turns.total_steps}
        real = few_shot(images, labels, **lengths, seed=seed)
    return DistillationModule(
        conversion.student,
        teacher,
        generator=made,
        turns=turns,
        learner=Learner(optimizer, learn=learn, schedule=schedule, inundation=inundation),
        loss=loss,
        few_shot=real,
        view=view,
        seed=seed,
    )


def distills(job: Job) -> bool:
    """Whether the student is fine-tuned."""
    settings = job.cfg.get("distillation")  # a run of before there was fine-tuning has none
    return settings is not None and settings.epochs > settings.get("warmup", 0)


def expect_purpose(turns: Turns, added_images: int) -> None:
    """Refuse a run of which nothing would be used.

    Raises:
        ValueError: if neither the student learns nor images are added, or both.
    """
    if added_images < 0 or bool(added_images) == bool(turns.student_steps):
        raise ValueError(
            "added_images, warmup: expected images to add and warmup = epochs, or none and fewer epochs of warm-up, "
            f"got {added_images} and {turns.warmup} of {turns.epochs} epochs"
        )


def expect_fine_tuning(job: Job) -> None:
    """Refuse, before any work is done, fine-tuning that would be none, or lacks what it needs.

    Raises:
        ValueError: if its numbers or its images do not fit, or the student is to be reconstructed too.
    """
    settings = job.cfg.get("distillation")
    if settings is None or "_target_" not in settings:  # distillation=none
        return
    told = ("epochs", "warmup", "steps", "range_epochs")
    turns = Turns(**{name: settings[name] for name in told if name in settings})
    expect_purpose(turns, settings.get("added_images", 0))
    if settings.get("generator") is None and turns.warmup:
        raise ValueError(
            f"distillation.warmup: expected 0 where no generator learns, got {turns.warmup}; set distillation.warmup=0"
        )
    make = instantiate(settings.optimizer)
    make([{"params": [nn.Parameter(torch.zeros(1))]}])  # refuses its own numbers
    Learner(make, **{name: settings[name] for name in ("learn", "schedule") if name in settings})
    _expect_labels(settings, job.source.origin)
    if distills(job) and job.cfg.reconstruction.phases != "none":
        raise ValueError(
            "distillation: expected none, or reconstruction=none, since fine-tuning stands in its place, got phases "
            f"{job.cfg.reconstruction.phases!r}; add reconstruction=none"
        )


def _expect_labels(settings: DictConfig, origin: str) -> None:
    """Refuse images without labels where something asks for these.

    Raises:
        ValueError: saying what to choose.
    """
    few = settings.get("few_shot")
    if few is not None and "untrusted_epochs" in few:
        raise ValueError(
            "distillation.few_shot.untrusted_epochs: expected untrusted, a share of the run, got the epochs of an "
            "earlier version; start the run anew"
        )
    if few is None or origin == "real":
        return
    aligned = few.get("alignment") is not None
    if aligned or origin == "none" or (few.get("batch_size", 1) and settings.loss.cross_entropy):
        remedy = "" if aligned or origin == "none" else ", or set distillation.loss.cross_entropy=0"
        raise ValueError(
            f"calibration: expected real, whose images have labels to fine-tune with, got {origin}; choose "
            f"calibration=real calibration.count=<number of classes>{remedy}"
        )


def expect_learnable(job: Job, conversion: Conversion) -> None:
    """Refuse a student whose weights cannot be trained where that is asked for.

    Raises:
        ValueError: naming the rounding.
    """
    if distills(job) and "weights" in job.cfg.distillation.learn:
        trained_weights(conversion.student)


def add_generated(job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> CalibrationImages:
    """The images, and those of a generator that was trained with them, if that is asked for: to reconstruct on.

    The generator's are made once and then come from the store, whatever the student's widths and methods are.
    """
    count = (job.cfg.get("distillation") or {}).get("added_images", 0)
    if not count:
        return images
    module = _build(job, teacher, conversion, images)
    recipe = {
        "added_images": RECIPE_VERSION,
        "precision": job.cfg.trainer.precision,
        "distillation": stated(plain(job.cfg.distillation)),
        "teacher": teacher.weights_hash,
        "input_size": teacher.input_size,
        "images": images.digest,
        "labels": None if images.labels is None else fingerprint({"labels": images.labels}),
        "student": student_settings(job) if module.compares_students else None,
        "seed": job.cfg.seed,
    }

    def make() -> Tensor:
        _fit(job, teacher, module)
        return module.generated(count).float()

    together = torch.cat([images.images, SampleStore(job.cfg.paths.store).get_or_make(recipe, make)])
    digest, from_store = fingerprint({"images": together}), module.stage not in job.fitted
    facts = {"count": len(together), "digest": digest, "added": count, "added_from_store": from_store}
    job.record.add(images=job.record.facts["images"] | facts)
    return dataclasses.replace(images, images=together, digest=digest, labels=None)


def distill(job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> None:
    """Fine-tune the student, in place."""
    module = _build(job, teacher, conversion, images)
    _fit(job, teacher, module)
    job.record.add(distillation=module.facts)


def _build(job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> DistillationModule:
    return instantiate(job.cfg.distillation)(
        conversion=conversion,
        teacher=teacher.network,
        input_size=teacher.input_size,
        images=images.images,
        labels=images.labels,
        seed=job.cfg.seed,
    )


def _fit(job: Job, teacher: Teacher, module: DistillationModule) -> None:
    """Train, and draw what the generator makes of each class."""
    with job.stage("distill"):
        trainer = job.alone(**module.trainer_arguments())
        job.fit(module, trainer)
        module.expect_complete(trainer.global_step)  # a Trainer without steps calls no hook of the module
    if module.has_panel and job.is_main:
        path = job.folder / "distillation.png"
        save_grid(module.panel(COLUMNS), path, mean=teacher.mean, std=teacher.std, columns=COLUMNS)
