"""Accuracy, bytes and latency in onnxruntime and OpenVINO, one row a run, into benchmarks/results/deployment.csv.

    python run.py -m export=onnx protocol=brecq,onnxruntime bits=w8a8,w4a4 hydra.sweep.dir=multirun/deployment
    python -m benchmarks.exported_runs multirun/deployment
    python -m benchmarks.exported_runs multirun/deployment --layers   each layer by itself, into deployment_layers.csv

Runs have to have been made with `export=onnx`; with `export.openvino=true` rows say the same of OpenVINO. A row has the
columns of every results file, then those of the export.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.table import RESULTS, read_rows
from callbacks.report import as_rows, write_csv
from callbacks.run_record import commit, machine
from deployment.latency import Latency
from deployment.runtime import instructions
from lightning_modules.deployed import measure_saved

WHERE = ("measured_on", "instructions", "threads", "batch")
SAME = (
    "network", "protocol", "w_bits", "a_bits", "allocation", "average_w_bits", "average_a_bits", "weight", "activation",
    "images", "image_count", "seed", "container", *WHERE,
)  # fmt: skip
LAYER = ("network", "protocol", "container", "layer", "w_bits", "a_bits", *WHERE)  # whatever allocation gave the bits


def rows_of(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a run, and those of its layers."""
    facts = json.loads((folder / "record.json").read_text())
    export, row = facts["export"], facts["row"]
    found = measure_saved(
        folder,
        batch=options.batch,
        threads=options.threads,
        rounds=options.rounds,
        layers=options.layers,
        openvino="openvino" in export,
    )
    float_model, quantized, *others = found.models
    slowest = max(found.operators, key=lambda operator: operator.microseconds)
    measured = {
        "container": export["container"], "onnx_top1": round(export["top1"], 2),
        "student_top1": round(export["student_top1"], 2), "rounded_bias_top1": round(export["rounded_top1"], 2),
        "onnx_agreement": round(export["agreement"], 2), "compared": export["compared"], "alike": export["alike"],
        "worst_steps": round(export["worst"]["steps"], 3), "worst_share": float(f"{export['worst']['share']:.2g}"),
        "logits_off": float(f"{export['logits_off']:.2g}"),
        "float_bytes": found.bytes["float"], "onnx_bytes": found.bytes["quantized"],
        "float_ms": round(float_model.milliseconds, 4), "onnx_ms": round(quantized.milliseconds, 4),
        "speedup": round(quantized.speedup, 3), "batch": options.batch, "threads": options.threads,
        "integer_convolutions": sum(o.operator == "QLinearConv" for o in found.operators),
        "float_convolutions": sum(o.operator in ("Conv", "FusedConv") for o in found.operators),
        "slowest_operator": f"{slowest.name} {slowest.operator}",
    }  # fmt: skip
    if others:
        measured |= in_openvino(export["openvino"], others)
    where = {"measured_on": machine(), "instructions": instructions(), "onnxruntime": version("onnxruntime")}
    shared = {"network": row["network"], "protocol": row["protocol"], "container": found.container}
    sizes = {"batch": options.batch, "threads": options.threads}
    made = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": commit()}
    layers = [shared | layer | sizes | where | made for layer in as_rows(found.layers)]
    return row | measured | where, layers


def in_openvino(export: dict[str, Any], models: Sequence[Latency]) -> dict[str, Any]:
    """What a row says of OpenVINO; `models`: float, then quantized."""
    float_model, quantized = models
    return {
        "openvino_top1": round(export["top1"], 2), "openvino_agreement": round(export["agreement"], 2),
        "openvino_alike": export["alike"], "openvino_steps": round(export["worst"]["steps"], 3),
        "openvino_share": float(f"{export['worst']['share']:.2g}"),
        "openvino_logits_off": float(f"{export['logits_off']:.2g}"),
        "openvino_float_ms": round(float_model.milliseconds, 4), "openvino_ms": round(quantized.milliseconds, 4),
        "openvino_speedup": round(quantized.speedup, 3), "openvino": version("openvino"),
    }  # fmt: skip


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]], same: tuple[str, ...]) -> list[dict[str, Any]]:
    """`new`, of equals the last, behind those of `old` that it does not measure again."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple("" if row.get(name) is None else str(row[name]) for name in same)

    again = {key(row): row for row in new}
    rows = [*(row for row in old if key(row) not in again), *again.values()]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, "") for name in columns} for row in rows]


def main() -> None:
    """Measure, print, and replace these runs' rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a run, or a sweep of runs")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    parser.add_argument("--threads", type=int, default=1, help="inside an operator")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each model")
    parser.add_argument("--layers", action="store_true", help="time each layer by itself as well")
    options = parser.parse_args()
    rows, layers = [], []
    for record in sorted(options.folder.glob("**/record.json")):
        if "top1" not in json.loads(record.read_text()).get("export", {}):
            print(f"left out: {record.parent}: no compared export", file=sys.stderr)
            continue
        row, own = rows_of(record.parent, options)
        rows.append(row)
        layers += own
        print(
            f"{row['network']:18} {row['protocol']:12} W{row['w_bits']}A{row['a_bits']} {row['container']:5} "
            f"top-1 {row['onnx_top1']:.2f} ({row['student_top1']:.2f})  {row['onnx_ms']:.3f} ms, "
            f"float {row['float_ms']:.3f} ms, x {row['speedup']:.2f}, OpenVINO x {row.get('openvino_speedup', '-')}, "
            f"{row['onnx_bytes'] // 1024} KiB",
            flush=True,
        )
    if not rows:
        raise SystemExit(f"no exported run below {options.folder}; make one with export=onnx")
    path = RESULTS / "deployment.csv"
    write_csv(path, merged(read_rows(path), rows, SAME))
    if layers:
        path = RESULTS / "deployment_layers.csv"
        write_csv(path, merged(read_rows(path), layers, LAYER))


if __name__ == "__main__":
    main()
