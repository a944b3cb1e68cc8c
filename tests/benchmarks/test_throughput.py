"""The throughput benchmark runs to its end; its figures are for the csv, not for a test."""

from __future__ import annotations

import argparse

from benchmarks.throughput import measure


def test_both_stages_are_measured_on_a_small_network() -> None:
    options = argparse.Namespace(steps=3, rounds=1, generators=["dsg", "genie"], reconstruction="brecq")
    rows = measure("cifar10_resnet20", options)
    assert [row["preset"] for row in rows] == ["dsg", "genie", "brecq"]
    for row in rows:
        assert row["ratio"] > 0
        assert row["seconds_per_step"] > 0 < row["bare_seconds_per_step"]
