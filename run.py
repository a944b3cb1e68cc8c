"""Calibrant's main job, in order: teacher, calibration images, student, reconstruction, score.

python run.py                    the embedded example
python run.py --help             groups, options, examples
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from callbacks import report
from callbacks.sample_grid import save_grid
from callbacks.target_plot import save_targets
from datamodules.calibration import CalibrationImages
from deployment.student_file import load_student, save_student
from lightning_modules.generator import GeneratorModule
from lightning_modules.job import Job, leave_process_group, open_job
from lightning_modules.saved_runs import plain
from lightning_modules.scoring import evaluate, expect_float_accuracy, flag_float_accuracy, float_reference
from networks.teachers import Teacher
from quantizers.calibrate import calibrate_ranges
from quantizers.convert import Conversion, convert
from quantizers.layer import hardened_copy
from quantizers.report import weight_bytes
from synthesis.analytic_ranges import Deviations, set_analytic_ranges
from synthesis.store import SampleStore

STUDENT = "student.safetensors"
RECIPE_VERSION = 1  # raise it when the same settings make other images than before


def run_job(cfg: DictConfig) -> dict[str, float]:
    """Run every stage and return the metrics by name."""
    with open_job(cfg) as job:
        expect_images(job)
        report.show_configuration(job.cfg, job.cfg.show.config)
        with job.stage("teacher"):
            teacher: Teacher = instantiate(job.cfg.model)
            reference = float_reference(job, teacher, instantiate(job.cfg.data))
        expect_float_accuracy(job, teacher, reference)
        conversion = make_student(job, teacher)
        networks: dict[str, nn.Module] = {"float": teacher.network}
        identity = {"teacher": teacher.weights_hash}
        if job.cfg.evaluate:
            load_student(conversion.student, Path(job.cfg.evaluate) / STUDENT, identity)
        else:
            images = calibration_images(job, teacher)
            set_ranges(job, teacher, conversion, images)
            learns = job.cfg.reconstruction.phases != "none"
            networks["nearest"] = hardened_copy(conversion.student) if learns else conversion.student
            if job.cfg.resume and (job.folder / STUDENT).exists():
                load_student(conversion.student, job.folder / STUDENT, identity)
            else:
                reconstruct(job, conversion, images)
                if not job.is_main:
                    return {}  # the other processes of a shared reconstruction have done their part
                save_student(conversion.student, job.folder / STUDENT, identity)
        metrics = evaluate(job, networks | {"quantized": conversion.student}, reference)
        conclude(job, teacher, conversion, metrics)
    return metrics


def expect_images(job: Job) -> None:
    """Refuse to reconstruct without images before any work is done."""
    if job.source.origin == "none" and job.cfg.reconstruction.phases != "none":
        raise ValueError(
            "reconstruction: expected none with calibration=none, which gives no images to reconstruct on, got phases "
            f"{job.cfg.reconstruction.phases!r}; add reconstruction=none, or choose calibration=synthetic"
        )


def make_student(job: Job, teacher: Teacher) -> Conversion:
    """Rewrite the teacher's graph with the quantizers that protocol and bits ask for; nothing is calibrated yet."""
    cfg = job.cfg
    with job.stage("convert"):
        conversion = convert(
            teacher.network,
            teacher.example(),
            instantiate(cfg.protocol),
            instantiate(cfg.weight),
            instantiate(cfg.activation),
            instantiate(cfg.bits),
        )
    quantizers = report.as_rows(conversion.report)
    title = f"quantizers, protocol {cfg.protocol.name}"
    path = job.folder / "quantizers.csv" if job.is_main else None
    report.show_rows(title, quantizers, show=cfg.show.quantizers, path=path)
    job.record.add(left_float=conversion.left_float)
    return conversion


def calibration_images(job: Job, teacher: Teacher) -> CalibrationImages:
    """Real, noise, or synthetic images; synthetic ones are made once and then come from the store."""
    with job.stage("images"):
        images = job.source.load(teacher, job.ledger, synthesizer(job, teacher))
    facts = {"origin": images.origin, "count": len(images.images), "digest": images.digest, "files": images.files}
    job.record.add(images=facts | {"from_store": images.origin == "synthetic" and not synthesised(job)})
    if job.is_main and len(images.images):
        save_grid(images.images, job.folder / "images.png", mean=teacher.mean, std=teacher.std)
    return images


def synthesised(job: Job) -> bool:
    """Whether this run took the steps of its images itself, now or before it was killed, or there are none to take."""
    before = job.record.facts.get("images", {"from_store": True})
    here = any(stage.startswith(GeneratorModule.stage) for stage in job.fitted)
    return here or not before.get("from_store") or not report.generator_steps(job.cfg.generator)


def rounded_student(job: Job, teacher: Teacher) -> nn.Module:
    """The student rounded to nearest, with ranges that need no image: what adaptive synthesis compares with."""
    cfg = job.cfg
    parts = [instantiate(cfg[name]) for name in ("protocol", "weight", "activation", "bits")]
    student = convert(teacher.network, teacher.example(), *parts).student
    set_analytic_ranges(student, teacher.network, teacher.input_size, rule=Deviations())
    return hardened_copy(student).requires_grad_(False).to(job.device)


def synthesizer(job: Job, teacher: Teacher) -> Callable[[int], Tensor]:
    """A function that makes `count` images from the teacher alone, or finds them in the store."""
    cfg = job.cfg
    store = SampleStore(cfg.paths.store)

    def make(count: int) -> Tensor:
        recipe: dict[str, Any] = {
            "synthesis": RECIPE_VERSION,
            "precision": cfg.trainer.precision,
            "generator": plain(cfg.generator),
            "teacher": teacher.weights_hash,
            "input_size": teacher.input_size,
            "count": count,
            "seed": cfg.seed,
        }

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
    save_targets(alignment, job.folder / "targets.png")


def set_ranges(job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> None:
    """Choose the range of every quantized activation, from images or, where there are none, from moments."""
    with job.stage("ranges"):
        conversion.student.to(job.device)
        if images.rule is None:
            calibrate_ranges(conversion.student, images.images, job.cfg.batch_size)
        else:
            set_analytic_ranges(conversion.student, teacher.network, teacher.input_size, rule=images.rule)


def reconstruct(job: Job, conversion: Conversion, images: CalibrationImages) -> None:
    """Optimise the student unit by unit against the teacher, where there is something to learn."""
    with job.stage("reconstruct"):
        module, datamodule = instantiate(job.cfg.reconstruction)(
            conversion=conversion, images=images.images, seed=job.cfg.seed
        )
        if module.has_work:
            job.fit(module, job.trainer(**module.trainer_arguments()), datamodule)
            leave_process_group()
    path = job.folder / "units.csv" if job.is_main else None
    report.show_rows("units", module.results, show=job.cfg.show.units, path=path)


def conclude(job: Job, teacher: Teacher, conversion: Conversion, metrics: dict[str, float]) -> None:
    """Write what was measured into the record and print the result table."""
    cfg, facts = job.cfg, job.record.facts
    float_bytes, quantized_bytes = weight_bytes(conversion.student)
    flag_float_accuracy(job, teacher, metrics["test/float/top1"])
    job.record.add(
        teacher={"name": teacher.name, "weights_hash": teacher.weights_hash, "stated_top1": teacher.stated_top1},
        metrics=metrics,
        bytes={"float": float_bytes, "quantized": quantized_bytes},
    )
    if not cfg.evaluate:
        job.record.add(row=report.result_row(facts))
    sizes = {"float": float_bytes, "nearest": quantized_bytes, "quantized": quantized_bytes}
    images = facts.get("images", {})
    caption = (
        f"{teacher.name}, protocol {cfg.protocol.name}, W{cfg.bits.weight}A{cfg.bits.activation}, "
        f"{images.get('count', 0)} {images.get('origin', 'no')} calibration images, "
        f"{facts['test_images']} test images, seed {cfg.seed}"
    )
    report.show_results(metrics, facts["stages"], sizes, caption)
    report.console.print(f"files in {job.folder}", highlight=False)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Command line: run the job and return the metric that a sweeper optimises."""
    try:
        metrics = run_job(cfg)
    except InstantiationException as error:  # what Hydra was asked to build refused its arguments: say that, not this
        raise (error.__cause__ or error) from None
    if not metrics:
        return float("nan")  # not the main process
    if cfg.optimized_metric not in metrics:
        raise ValueError(f"optimized_metric: expected one of {sorted(metrics)}, got {cfg.optimized_metric!r}")
    return metrics[cfg.optimized_metric]


if __name__ == "__main__":
    main()
