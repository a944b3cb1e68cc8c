"""Rows of the deployment benchmark: columns of the run, of its export, of latency; measured again, replaced."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.deployment import SAME, merged, rows_of
from run import run_job
from tests.configuration import SMALL, composed


def test_a_run_gives_its_row_and_those_of_its_layers(tmp_path: Path) -> None:
    small = [*SMALL, "calibration=noise", "reconstruction=none", "protocol=onnxruntime", "bits=w8a8"]
    run_job(composed([*small, "export=onnx"], tmp_path))
    row, layers = rows_of(tmp_path, argparse.Namespace(batch=1, threads=1, rounds=1, layers=True))
    assert list(row)[:5] == ["network", "float_top1", "protocol", "w_bits", "a_bits"]
    assert row["worst_steps"] <= 1
    assert row["integer_convolutions"] == 7
    assert row["float_convolutions"] == 0
    assert row["onnx_bytes"] < row["float_bytes"]
    assert row["onnx_ms"] > 0 < row["speedup"]
    assert len(layers) == 16
    assert {layer["kernel"] for layer in layers[1::2]} == {"QLinearConv", "QGemm"}


def test_what_is_measured_again_is_replaced() -> None:
    row = dict.fromkeys(SAME, "a") | {"speedup": 1}
    other = row | {"container": "b"}
    assert merged([row, other], [row | {"speedup": 2}], SAME) == [other, row | {"speedup": 2}]
