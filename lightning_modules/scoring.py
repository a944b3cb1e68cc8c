"""Scoring: all networks in one pass, and the float one before any work is done."""

from __future__ import annotations

from torch import nn

from allocation.costs import summary
from callbacks import report
from datamodules.evaluation import EvaluationData
from lightning_modules.evaluation import EvaluationModule
from lightning_modules.float_reference import FloatReference
from lightning_modules.job import Job
from lightning_modules.saved_runs import plain
from networks.teachers import Teacher
from quantizers.report import weight_bytes
from synthesis.store import SampleStore


def float_reference(job: Job, teacher: Teacher, data: EvaluationData) -> FloatReference:
    """The evaluation data and what is known of the float network's answers on it; no image is opened.

    Raises:
        ValueError: if the data are missing or do not fit the model.
    """
    cfg = job.cfg
    data.expect()
    return FloatReference(
        SampleStore(cfg.paths.store),
        data,
        teacher=teacher.weights_hash,
        settings={"model": plain(cfg.model), "data": plain(cfg.data)},
        computed={
            "machine": job.record.facts["machine"],
            "precision": cfg.trainer.precision,
            "batch_size": cfg.data.batch_size,
        },
    )


def expect_float_accuracy(job: Job, teacher: Teacher, reference: FloatReference) -> None:
    """Warn of a float accuracy that is not the stated one before any work is done.

    Where no earlier run has measured it, it is measured now if real images may be opened; a data-free run opens none.
    """
    top1 = reference.known_top1()
    if top1 is None and job.is_main and not job.ledger.data_free and not job.cfg.evaluate:
        top1 = evaluate(job, {"float": teacher.network}, reference, stage="float")["test/float/top1"]
    if top1 is not None:
        flag_float_accuracy(job, teacher, top1)


def flag_float_accuracy(job: Job, teacher: Teacher, top1: float) -> None:
    """Compare with the stated accuracy, which is that of all images."""
    stated = teacher.stated_top1 if job.cfg.data.limit is None else None
    job.record.add(warning=report.flag_float_accuracy(top1, stated, job.cfg.stated_tolerance))


def evaluate(
    job: Job, networks: dict[str, nn.Module], reference: FloatReference, stage: str = "evaluation"
) -> dict[str, float]:
    """Score all networks in one pass over the evaluation data: the first time a data-free run sees a real image."""
    data = reference.data
    with job.stage(stage):
        if data.dataset is None:
            data.load(job.ledger)
        known = reference.answers()
        module = EvaluationModule(networks, reference="float", known=known)
        trainer = job.alone() if stage == EvaluationModule.stage else job.alone(logger=False)
        results = trainer.test(module, datamodule=data, verbose=False)
        from_store = known is not None and reference.measured is None
        if known is None:
            reference.keep(module.answered, results[0]["test/float/top1"])
    job.record.add(test_images=data.count, limit=data.limit, float_from_store=from_store)
    return {key: float(value) for key, value in results[0].items()}


def sizes(job: Job, student: nn.Module) -> dict[str, float]:
    """What the student takes to store, logged beside its accuracy: bytes, and its weights' share of float32's."""
    found = {"size/bytes": float(weight_bytes(student)[1])}
    fraction = summary(student)["size_fraction"]
    if fraction is not None:
        found["size/fraction"] = fraction
    job.log(found)
    return found
