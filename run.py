"""Calibrant's main job: teacher, student, images, widths, ranges, reconstruction, corrections, score, export.

python run.py                    the embedded example
python run.py --help             groups, options, examples
"""

from __future__ import annotations

import functools
from pathlib import Path

import hydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from allocation.costs import summary
from allocation.groups import Bits
from callbacks import report
from callbacks.sample_grid import save_grid
from datamodules.calibration import CalibrationImages
from deployment.student_file import load_student, save_student
from lightning_modules.allocation import FILE, known_bits
from lightning_modules.exporting import chosen_export, expect_exportable, export_student
from lightning_modules.fine_tuning import add_generated, distill, distills, expect_fine_tuning, expect_learnable
from lightning_modules.generator import GeneratorModule
from lightning_modules.job import Job, open_job
from lightning_modules.processes import leave_process_group
from lightning_modules.refusals import AlreadyFinishedError
from lightning_modules.saved_runs import plain
from lightning_modules.scoring import evaluate, expect_float_accuracy, flag_float_accuracy, float_reference, sizes
from lightning_modules.shared_reconstruction import learn_in_shares, recipe_of
from lightning_modules.stored_synthesis import synthesizer
from networks.teachers import Teacher
from quantizers.calibrate import calibrate_ranges
from quantizers.convert import Conversion, convert
from quantizers.layer import hardened_copy
from quantizers.report import weight_bytes
from synthesis.analytic_ranges import set_analytic_ranges
from synthesis.store import SampleStore

STUDENT = "student.safetensors"
RECONSTRUCTED = "reconstructed.safetensors"  # the student before corrections, until these are done
LEARNING = ("reconstruction", "protocol", "weight", "activation", "bits", "seed")  # what a student depends on
COMPUTING = ("accelerator", "precision", "deterministic")  # and of its trainer


def run_job(cfg: DictConfig) -> dict[str, float]:
    """Run every stage and return the metrics by name."""
    with open_job(cfg) as job:
        expect_possible(job)
        report.show_configuration(job.cfg, job.cfg.show.config)
        with job.stage("teacher"):
            teacher: Teacher = instantiate(job.cfg.model)
            reference = float_reference(job, teacher, instantiate(job.cfg.data))
        conversion = make_student(job, teacher, known_bits(job))
        expect_exportable(job, teacher, conversion.student)
        expect_float_accuracy(job, teacher, reference)
        networks: dict[str, nn.Module] = {"float": teacher.network}
        identity = {"teacher": teacher.weights_hash}
        if job.cfg.evaluate:
            load_student(conversion.student, Path(job.cfg.evaluate) / STUDENT, identity)
        else:
            images = add_generated(job, teacher, conversion, calibration_images(job, teacher))
            conversion = allocate(job, teacher, conversion, images)
            set_ranges(job, conversion, images)
            learns = job.cfg.reconstruction.phases != "none" or distills(job)
            changes = learns or job.corrections.changes_students
            if job.cfg.score_nearest:
                networks["nearest"] = hardened_copy(conversion.student) if changes else conversion.student
            if job.cfg.resume and (job.folder / STUDENT).exists():
                load_student(conversion.student, job.folder / STUDENT, identity)
            else:
                if distills(job):
                    distill(job, teacher, conversion, images)
                else:
                    reconstruct(job, conversion, images, identity)
                if not job.is_main:
                    return {}  # the other processes of a shared reconstruction have done their part
                correct(job, teacher, conversion, images)
                save_student(conversion.student, job.folder / STUDENT, identity)
            job.forget_checkpoints()
            (job.folder / RECONSTRUCTED).unlink(missing_ok=True)
        metrics = evaluate(job, networks | {"quantized": conversion.student}, reference)
        metrics |= sizes(job, conversion.student)
        conclude(job, teacher, conversion, metrics)
        export_student(job, teacher, conversion.student, reference.data)
    return metrics


def expect_possible(job: Job) -> None:
    """Refuse what cannot work, reconstruction or corrections without images above all, before any work is done."""
    if job.source.origin == "none" and job.cfg.reconstruction.phases != "none":
        raise ValueError(
            "reconstruction: expected none with calibration=none, which gives no images to reconstruct on, got phases "
            f"{job.cfg.reconstruction.phases!r}; add reconstruction=none, or choose calibration=synthetic"
        )
    job.allocation.expect_images(job.source.origin)
    expect_fine_tuning(job)
    job.corrections.expect_images(job.source.origin)
    if not job.cfg.evaluate:
        job.corrections.warn_of_order()
    chosen_export(job)
    shares, learned = job.cfg.share_reconstruction, job.cfg.reconstruction.phases not in ("none", "closed_form")
    if shares < 1 or (shares > 1 and learned and job.cfg.reconstruction.schedule != "parallel"):
        raise ValueError(
            f"share_reconstruction: expected 1, or more with reconstruction.schedule=parallel, got {shares} with "
            f"{job.cfg.reconstruction.get('schedule')!r}"
        )


def make_student(job: Job, teacher: Teacher, bits: Bits | None, stage: str = "convert") -> Conversion:
    """Rewrite the teacher's graph with the quantizers that protocol and bits ask for; nothing is calibrated yet."""
    cfg = job.cfg
    with job.stage(stage):
        conversion = convert(
            teacher.network,
            teacher.example(),
            instantiate(cfg.protocol),
            instantiate(cfg.weight),
            instantiate(cfg.activation),
            instantiate(cfg.bits),
            allocation=bits,
            prepare=job.corrections.prepare,
        )
    job.corrections.expect(conversion)
    expect_learnable(job, conversion)
    quantizers = report.as_rows(conversion.report)
    title = f"quantizers, protocol {cfg.protocol.name}"
    path = job.folder / "quantizers.csv" if job.is_main else None
    report.show_rows(title, quantizers, show=cfg.show.quantizers, path=path)
    skipped = [{"module": path, "why it is not traced": why} for path, why in conversion.opaque.items()]
    report.show_rows("not traced: quantized layer by layer, in place", skipped, show=True)
    job.record.add(left_float=conversion.left_float, opaque=conversion.opaque)
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


def allocate(job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> Conversion:
    """Choose the widths of every layer and convert anew, where they are to be found and have not been."""
    if not job.allocation.searches or (job.cfg.resume and (job.folder / FILE).exists()):
        return conversion
    with job.stage("allocation"):
        bits = job.allocation.find(job, teacher, conversion, images)
    return make_student(job, teacher, bits, "convert_allocated")


def synthesised(job: Job) -> bool:
    """Whether this run took the steps of its images itself, now or before it was killed, or there are none to take."""
    before = job.record.facts.get("images", {"from_store": True})
    here = any(stage.startswith(GeneratorModule.stage) for stage in job.fitted)
    return here or not before.get("from_store") or not report.generator_steps(job.cfg.generator)


def set_ranges(job: Job, conversion: Conversion, images: CalibrationImages) -> None:
    """Choose the range of every quantized activation, from images or, where there are none, from moments."""
    with job.stage("ranges"):
        conversion.student.to(job.device)
        if images.rule is None:
            calibrate_ranges(conversion.student, images.images, job.cfg.batch_size)
        else:
            set_analytic_ranges(conversion, rule=images.rule)


def reconstruct(job: Job, conversion: Conversion, images: CalibrationImages, identity: dict[str, str]) -> None:
    """Optimise the student unit by unit against the teacher, where there is something to learn."""
    cfg = job.cfg
    if cfg.resume and (job.folder / RECONSTRUCTED).exists():
        load_student(conversion.student, job.folder / RECONSTRUCTED, identity)
        return
    with job.stage("reconstruct"):
        build = functools.partial(
            instantiate(cfg.reconstruction), conversion=conversion, images=images.images, seed=cfg.seed
        )
        if cfg.share_reconstruction > 1:
            settings = plain(cfg)
            chosen = {key: settings[key] for key in LEARNING} | {key: settings["trainer"].get(key) for key in COMPUTING}
            rows = learn_in_shares(
                build,
                lambda module, datamodule: job.fit(module, job.alone(**module.trainer_arguments()), datamodule),
                shares=cfg.share_reconstruction,
                store=SampleStore(cfg.paths.store),
                recipe=recipe_of(conversion, images.images, chosen),
            )
        else:
            module, datamodule = build()
            if module.has_work:
                job.fit(module, job.trainer(**module.trainer_arguments()), datamodule)
                leave_process_group()
            rows = module.results
    path = job.folder / "units.csv" if job.is_main else None
    report.show_rows("units", rows, show=cfg.show.units, path=path)
    if job.corrections.changes_students and job.is_main:
        save_student(conversion.student, job.folder / RECONSTRUCTED, identity)


def correct(job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> None:
    """Apply the corrections of the finished student in their order; those of the float graph came with conversion."""
    if job.corrections.changes_students:
        with job.stage("corrections"):
            job.corrections.apply(job, teacher.network, conversion, images.images)
    job.record.add(corrections=job.corrections.applied)


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
    found = {"name": job.allocation.name} | facts.get("allocation", {}) | summary(conversion.student)
    job.record.add(allocation=found)
    if not cfg.evaluate:
        job.record.add(row=report.result_row(facts))
    sizes = {"float": float_bytes, "nearest": quantized_bytes, "quantized": quantized_bytes}
    images = facts.get("images", {})
    widths = f"W{cfg.bits.weight}A{cfg.bits.activation}"
    if found["name"] != "uniform":
        widths = (
            f"{found['name']} W{found['average_weight_bits'] or 32:.2f}A{found['average_activation_bits'] or 32:.2f}"
        )
    caption = (
        f"{teacher.name}, protocol {cfg.protocol.name}, {widths}, "
        f"{images.get('count', 0)} {images.get('origin', 'no')} calibration images, "
        f"{facts['test_images']} test images, seed {cfg.seed}"
    )
    report.show_results(metrics, facts["stages"], sizes, caption)
    report.console.print(f"files in {job.folder}", highlight=False)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | list[float]:
    """Command line: run the job and return the metric, or the list of metrics, that a sweeper optimises."""
    try:
        metrics = run_job(cfg)
    except AlreadyFinishedError as found:
        report.console.print(str(found), highlight=False)
        metrics = found.metrics
    except InstantiationException as error:  # what Hydra was asked to build refused its arguments: say that, not this
        raise (error.__cause__ or error) from None
    if not metrics:
        return float("nan")  # not the main process
    several = not isinstance(cfg.optimized_metric, str)
    chosen = list(cfg.optimized_metric) if several else [cfg.optimized_metric]
    for name in chosen:
        if name not in metrics:
            raise ValueError(f"optimized_metric: expected one of {sorted(metrics)}, got {name!r}")
    return [metrics[name] for name in chosen] if several else metrics[chosen[0]]


if __name__ == "__main__":
    main()
