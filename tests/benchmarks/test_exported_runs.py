"""Rows of the deployment benchmark: columns of the run, of its export, of latency; measured again, replaced."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.exported_runs import LAYER, SAME, merged, rows_of
from benchmarks.table import RESULTS, read_rows
from callbacks.report import write_csv
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
    assert set(SAME) <= set(row)
    assert all(set(LAYER) | {"date", "commit", "onnxruntime"} <= set(layer) for layer in layers)
    assert row["instructions"] == layers[0]["instructions"]


def test_a_run_compared_in_openvino_says_so(tmp_path: Path) -> None:
    small = [*SMALL, "calibration=noise", "reconstruction=none", "protocol=onnxruntime", "bits=w8a8"]
    run_job(composed([*small, "export=onnx", "export.openvino=true"], tmp_path))
    row, _ = rows_of(tmp_path, argparse.Namespace(batch=1, threads=1, rounds=1, layers=False))
    assert (row["compared"], row["alike"], row["openvino_alike"], row["openvino_agreement"]) == (64, 64, 64, 100)
    assert row["openvino_ms"] > 0 < row["openvino_speedup"]
    assert max(row["worst_share"], row["openvino_share"]) < 1e-3
    assert max(row["logits_off"], row["openvino_logits_off"]) < 1e-5


def test_what_is_measured_again_is_replaced() -> None:
    row = dict.fromkeys(SAME, "a") | {"speedup": 1}
    other = row | {"container": "b"}
    assert merged([row, other], [row | {"speedup": 2}], SAME) == [other, row | {"speedup": 2}]
    assert merged([], [row, row | {"speedup": 2}], SAME) == [row | {"speedup": 2}]


@pytest.mark.parametrize(
    ("same", "column"),
    [
        (SAME, "allocation"),
        (SAME, "average_w_bits"),
        (SAME, "images"),
        (SAME, "measured_on"),
        (SAME, "instructions"),
        (LAYER, "measured_on"),
        (LAYER, "instructions"),
        (LAYER, "container"),
    ],
)
def test_measuring_one_of_two_leaves_the_other(same: tuple[str, ...], column: str, tmp_path: Path) -> None:
    uniform, other = ({"average_w_bits": 8.0, column: value, "speedup": 1} for value in (6.0, 7.0))
    rows = [dict.fromkeys(same) | row for row in (uniform, other)]
    write_csv(tmp_path / "rows.csv", rows)
    found = merged(read_rows(tmp_path / "rows.csv"), [rows[0] | {"speedup": 2}], same)
    assert [(str(row[column]), str(row["speedup"])) for row in found] == [("7.0", "1"), ("6.0", "2")]


def test_no_two_rows_of_the_results_are_the_same_measurement() -> None:
    for name, same in (("deployment", SAME), ("deployment_layers", LAYER)):
        rows = read_rows(RESULTS / f"{name}.csv")
        assert len(merged([], rows, same)) == len(rows) > 0
        assert all(row["measured_on"] and row["instructions"] and row["date"] and row["commit"] for row in rows)
