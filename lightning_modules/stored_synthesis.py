"""Synthetic images and their targets for a job: found in the store, or made and put there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra.utils import instantiate
from torch import Tensor, nn

from callbacks.target_plot import save_targets
from lightning_modules.generator import GeneratorModule
from lightning_modules.job import Job
from lightning_modules.saved_runs import plain, stated
from networks.teachers import Teacher
from quantizers.convert import convert
from quantizers.layer import hardened_copy
from synthesis.analytic_ranges import Deviations, set_analytic_ranges
from synthesis.store import SampleStore

RECIPE_VERSION = 2  # raise it when the same settings make other images than before, by more than rounding
STUDENT = ("protocol", "weight", "activation", "bits")  # groups of the configuration that make one


def synthesizer(job: Job, teacher: Teacher) -> Callable[[int], Tensor]:
    """A function that makes `count` images from the teacher alone, or finds them in the store."""
    cfg = job.cfg
    store = SampleStore(cfg.paths.store)

    def make(count: int) -> Tensor:
        recipe: dict[str, Any] = {
            "synthesis": RECIPE_VERSION,
            "precision": cfg.trainer.precision,
            "generator": stated(plain(cfg.generator)),
            "teacher": teacher.weights_hash,
            "input_size": teacher.input_size,
            "count": count,
            "seed": cfg.seed,
        }
        if any(term.uses_student for term in instantiate(cfg.generator.get("guidance", {}), _convert_="all").values()):
            recipe["student"] = student_settings(job)
        job.record.add(stored_images=store.path(recipe).name)

        def build(count: int, first_batch: int = 0) -> GeneratorModule:
            return instantiate(cfg.generator)(
                network=teacher.network,
                input_size=teacher.input_size,
                count=count,
                first_batch=first_batch,
                seed=cfg.seed,
                student=lambda: rounded_student(job, teacher),
            )

        def fit(module: GeneratorModule) -> Tensor:
            if module.has_work:
                recall_targets(job, teacher, module)
                job.fit(module, job.alone(max_epochs=module.batches))
            else:
                module.render()
            return module.images

        if not cfg.share_synthesis:
            return store.get_or_make(recipe, lambda: fit(build(count)))
        if (found := store.get(recipe)) is not None:
            return found
        whole = build(count)
        if not (whole.has_work and whole.independent):
            return store.get_or_make(recipe, lambda: fit(whole))
        size = whole.source.batch_size

        def fit_part(part: int) -> Tensor:
            module = build(min(size, count - part * size), first_batch=part)
            module.stage = f"synthesis_{part}"  # a checkpoint of its own, so that a killed job goes on in its part
            return fit(module)

        return store.get_or_gather(recipe, whole.batches, fit_part)

    return make


def student_settings(job: Job) -> dict[str, Any]:
    """What a student depends on before it has learned."""
    settings = plain(job.cfg)
    return {key: settings[key] for key in STUDENT}


def rounded_student(job: Job, teacher: Teacher) -> nn.Module:
    """The student rounded to nearest, with ranges that need no image: what adaptive synthesis compares with."""
    parts = [instantiate(job.cfg[key]) for key in STUDENT]
    conversion = convert(teacher.network, teacher.example(), *parts)
    set_analytic_ranges(conversion, rule=Deviations())
    return hardened_copy(conversion.student).requires_grad_(False).to(job.device)


def recall_targets(job: Job, teacher: Teacher, module: GeneratorModule) -> None:
    """Measure the moments to match and their slack, or find them in the store; they depend on the teacher alone."""
    generator, alignment = plain(job.cfg.generator), module.alignment
    recipe: dict[str, Any] = {
        "targets": RECIPE_VERSION,
        "teacher": teacher.weights_hash,
        "input_size": teacher.input_size,
        "batch_size": module.source.batch_size,
        "seed": job.cfg.seed,
    } | {key: generator.get(key) for key in ("targets", "slack", "sda", "probe", "fold_batch_norm")}

    def measure() -> Tensor:
        alignment.place(job.device)
        return alignment.found_targets()

    alignment.recall(SampleStore(job.cfg.paths.store).get_or_make(recipe, measure))
    if job.is_main:
        save_targets(alignment, job.folder / "targets.png")
