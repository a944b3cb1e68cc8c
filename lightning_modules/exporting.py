"""The last stage of a run: the student as a file for other runtimes, and the proof that it computes the same."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from torch import fx

from callbacks import report
from datamodules.evaluation import EvaluationData
from deployment.exports import FILE, PARITY, OnnxExport, failed, written_if_alike
from deployment.onnx_export import Exported
from deployment.openvino_model import RuntimeProcessError
from deployment.packages import expect_installed
from deployment.parity import ParityError, compare, expect_parity
from deployment.predictions import expect_same_top1, predictions
from deployment.runtime import Runtime, load
from networks.teachers import Teacher
from quantizers.layer import hardened_copy

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
    for package in ("onnx", *chosen.runtimes):
        expect_installed(package)
    return chosen


def expect_exportable(job: Job, teacher: Teacher, student: fx.GraphModule) -> None:
    """Write the freshly converted student in memory, before hours of work, and let the runtimes load it.

    Raises:
        ValueError: for an operator or a part that cannot be written, or a model that a runtime does not load.
        RuntimeProcessError: if a runtime's process ends.
    """
    chosen = chosen_export(job)
    if chosen is None:
        return
    exported = chosen.make(hardened_copy(student).cpu().eval(), teacher.input_size)
    if chosen.compared == 0:
        return
    model = exported.model.SerializeToString()
    for runtime in chosen.runtimes:
        try:
            load(model, runtime, threads=chosen.threads)
        except (ValueError, RuntimeProcessError):
            raise
        except Exception as error:  # onnxruntime has a class for every reason
            raise ValueError(
                f"export: expected a model that the installed {runtime} loads, which it refuses ({error}); choose "
                "another export.container or export.opset, or export.compared=0 to write it without comparing"
            ) from error


def export_student(job: Job, teacher: Teacher, student: fx.GraphModule, data: EvaluationData) -> None:
    """Write what `export` asks for, and run it on the evaluation images, which are open by now.

    Raises:
        ParityError: where the runtime does not follow the student: the file is kept under another name, `model.onnx`
            stays as it was, and the rows say where they part.
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
        exported = chosen.make(student, teacher.input_size, facts)
        found = {"file": FILE, "container": chosen.container, "bytes": len(exported.model.SerializeToString())}
        found["float_biases"] = exported.float_biases
        for name in PARITY.values():  # of an earlier export into this folder
            (job.folder / name).unlink(missing_ok=True)
        try:
            with written_if_alike(exported, job.folder / FILE):
                if chosen.compared != 0:
                    verify(job, chosen, student, exported, data, found)
        except ParityError:
            found["file"] = failed(job.folder / FILE).name
            raise
        finally:
            job.record.add(export=found)
    how = "not compared"
    if "top1" in found:
        accuracies = [f"{found['top1']:.2f} in onnxruntime"]
        if chosen.openvino:
            accuracies.append(f"{found['openvino']['top1']:.2f} in OpenVINO")
        how = (
            f"top-1 {', '.join(accuracies)} (student {found['student_top1']:.2f}), integers and predictions "
            f"of {found['compared']} images are the student's up to ties"
        )
    report.console.print(f"{FILE}: {found['bytes'] / 1024:.0f} KiB, {how}", highlight=False)


def verify(
    job: Job,
    chosen: OnnxExport,
    student: fx.GraphModule,
    exported: Exported,
    data: EvaluationData,
    found: dict[str, Any],
) -> None:
    """Compare tensor by tensor, then count predictions; what is seen goes into `found`, of OpenVINO below its name."""
    facts: dict[Runtime, dict[str, Any]] = {}
    for runtime in chosen.runtimes:
        seen = facts[runtime] = found if runtime == "onnxruntime" else found.setdefault(runtime, {})
        batches = (images for images, _ in data.test_dataloader())
        parity = compare(student, exported, batches, limit=chosen.compared, threads=chosen.threads, runtime=runtime)
        report.write_csv(job.folder / PARITY[runtime], report.as_rows(parity.rows))
        worst = max(parity.rows, key=lambda row: (row.steps, row.share))
        seen |= {"compared": parity.images, "alike": parity.alike, "logits_off": parity.rows[-1].relative}
        seen["worst"] = asdict(worst)
        expect_parity(parity)
    scores = predictions(student, exported, data.test_dataloader(), threads=chosen.threads, runtimes=chosen.runtimes)
    for runtime, own in scores.items():
        facts[runtime] |= asdict(own)
    for own in scores.values():
        expect_same_top1(own, chosen.tolerance)
