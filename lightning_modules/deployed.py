"""Finished runs on their way to a machine: export of a saved student, and how fast it is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from deployment.containers import Container
from deployment.exports import FILE, OnnxExport, written_if_alike
from deployment.latency import Latency, LayerTime, OperatorTime, latencies, layer_times, operator_times
from deployment.latency_table import PairTime, latency_table
from deployment.onnx_export import export_onnx
from deployment.parity import TensorParity, compare, expect_parity
from deployment.runtime import container_of, runtimes
from deployment.whole_file import expect_no_folder
from lightning_modules.saved_students import load_student_from
from quantizers.layer import float_mode


class Measured(NamedTuple):
    """`models`: float first; `bytes` by model; `operators` of the quantized one; `layers` in float and quantized;
    `table`: each layer at every pair of widths; `container` of the quantized one, of `layers` and `table`.
    """

    models: list[Latency]
    bytes: dict[str, int]
    operators: list[OperatorTime]
    layers: list[LayerTime]
    table: list[PairTime]
    container: str


def export_saved(folder: Path, chosen: OnnxExport, output: Path | None = None) -> tuple[Path, list[TensorParity]]:
    """Writes the student of a run as ONNX and compares every tensor on noise, in each runtime; no data are needed.

    Args:
        folder: of the run.
        chosen: container, opset, number of images, threads, runtimes.
        output: None is `model.onnx` in the run's folder.

    Raises:
        ValueError: see `load_student_from`, `export_onnx`; if `output` is a folder; for all images (`compared` None),
            which noise has no number of.
        ParityError: where the runtime does not follow the student; a file from before stays, see `written_if_alike`.
    """
    path = output or folder / FILE
    expect_no_folder(path)
    if chosen.compared is None:
        raise ValueError("export.compared: expected a number of noise images to compare on, got null; choose 256")
    saved = load_student_from(folder)
    exported = chosen.make(saved.network, saved.input_size, saved.metadata)
    rows: list[TensorParity] = []
    with written_if_alike(exported, path):
        if chosen.compared:
            images = torch.randn(chosen.compared, *saved.input_size, generator=torch.Generator().manual_seed(0))
            for runtime in chosen.runtimes:
                found = compare(saved.network, exported, [images], threads=chosen.threads, runtime=runtime)
                expect_parity(found)
                rows += found.rows
    return path, rows


def measure_saved(
    folder: Path,
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 9,
    seconds: float = 0.3,
    layers: bool = True,
    table: bool = False,
    openvino: bool = False,
) -> Measured:
    """Times float network and student of a run in turns; the run's own `model.onnx` where there is one.

    Args:
        folder: of the run.
        batch: images at a time.
        threads: inside an operator.
        rounds: turns of each model; an odd number.
        seconds: length of a turn.
        layers: whether to time each layer by itself.
        table: whether to time each layer at every pair of widths.
        openvino: whether to time both networks in OpenVINO as well; operators, layers and table are onnxruntime's.

    Raises:
        ValueError: see `load_student_from`; for a batch or a number of threads below 1, or an even number of rounds.
    """
    if batch < 1 or threads < 1:
        raise ValueError(f"batch, threads: expected at least 1 each, got {batch} and {threads}")
    saved = load_student_from(folder)
    with float_mode(saved.network):
        models = {"float": export_onnx(saved.network, saved.input_size).model.SerializeToString()}
    written = folder / FILE
    quantized = written.read_bytes() if written.exists() else None
    container = _container(quantized)
    if quantized is None:
        quantized = export_onnx(saved.network, saved.input_size).model.SerializeToString()
    models["quantized"] = quantized
    images = torch.randn(batch, *saved.input_size, generator=torch.Generator().manual_seed(0))
    network, size = saved.network, saved.input_size
    alike: Any = {"batch": batch, "threads": threads, "container": container}
    timing: Any = {"threads": threads, "rounds": rounds, "seconds": seconds}
    return Measured(
        models=latencies(models, images, runtimes=runtimes(openvino=openvino), **timing),
        bytes={name: len(model) for name, model in models.items()},
        operators=operator_times(models["quantized"], images, threads=threads),
        layers=layer_times(network, size, **alike) if layers else [],
        table=latency_table(network, size, rounds=rounds, **alike) if table else [],
        container=container,
    )


def _container(model: bytes | None) -> Container:
    """That which the model says it was written in."""
    return cast(Container, (container_of(model) if model else None) or "auto")
