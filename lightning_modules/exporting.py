"""The last stage of a run: the student as a file for other runtimes, and the proof that it computes the same."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING

from hydra.utils import instantiate
from torch import fx

from callbacks import report
from datamodules.evaluation import EvaluationData
from deployment.exports import FILE, OnnxExport
from deployment.parity import compare, expect_parity, expect_same_top1, predictions
from deployment.runtime import require
from networks.teachers import Teacher

if TYPE_CHECKING:
    from lightning_modules.job import Job


def chosen_export(job: Job) -> OnnxExport | None:
    """What `export` asks for; None where nothing is exported.

    Raises:
        ValueError: for settings that cannot be, or a package that is not installed.
    """
    chosen = instantiate(job.cfg.get("export", {}))
    if not isinstance(chosen, OnnxExport):
        return None
    for package in ("onnx", "onnxruntime"):
        require(package)
    return chosen


def export_student(job: Job, teacher: Teacher, student: fx.GraphModule, data: EvaluationData) -> None:
    """Write what `export` asks for, and run it on the evaluation images, which are open by now.

    Raises:
        ParityError: where the runtime does not follow the student; the file and the rows up to there are kept.
    """
    chosen = chosen_export(job)
    if chosen is None:
        return
    with job.stage("export"):
        facts = {
            "config_hash": job.record.facts["config_hash"],
            "protocol": job.cfg.protocol.name,
            "teacher": f"{teacher.name} {teacher.weights_hash}",
            "data_free": str(job.ledger.data_free).lower(),
        }
        student = copy.deepcopy(student).cpu().eval()
        exported = chosen.write(student, teacher.input_size, job.folder / FILE, facts)
        found = {"file": FILE, "container": chosen.container, "bytes": (job.folder / FILE).stat().st_size}
        found["float_biases"] = exported.float_biases
        job.record.add(export=found)
        if not chosen.compared:
            return
        batches = data.test_dataloader()
        images = next(iter(batches))[0][: chosen.compared]
        rows = compare(student, exported, images, threads=chosen.threads)
        report.write_csv(job.folder / "parity.csv", report.as_rows(rows))
        worst = max(rows, key=lambda row: row.steps)
        scores = predictions(student, exported, batches, threads=chosen.threads)
        job.record.add(export=found | {"worst": asdict(worst)} | asdict(scores))
        expect_parity(rows)
        expect_same_top1(scores, chosen.tolerance)
    report.console.print(
        f"{FILE}: {found['bytes'] / 1024:.0f} KiB, top-1 in onnxruntime {scores.top1:.2f} (student "
        f"{scores.student_top1:.2f}), every tensor within {worst.steps:.2g} steps",
        highlight=False,
    )
