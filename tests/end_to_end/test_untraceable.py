"""A network that cannot be traced goes through the whole job, and the run says which part of it was skipped."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from callbacks import report
from networks.teachers import Teacher, load_teacher
from run import run_job
from tests.configuration import SMALL, composed


class Gate(nn.Module):
    """A convolution that runs or not, depending on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.abs().max() > 0 else x


class Gated(nn.Module):
    """A network behind a gate; `whole`: no part of it can be traced."""

    def __init__(self, body: nn.Module, *, whole: bool) -> None:
        super().__init__()
        self.gate, self.body, self.whole = Gate(), body, whole

    def forward(self, x: Tensor) -> Tensor:
        if self.whole and x.isnan().any():
            return x
        return self.body(self.gate(x))


def gated_teacher(*, whole: bool, **arguments: Any) -> Teacher:
    """The tiny teacher behind a gate."""
    teacher = load_teacher(**arguments)
    torch.manual_seed(0)
    return replace(teacher, network=Gated(teacher.network, whole=whole).eval().requires_grad_(False))


@pytest.mark.parametrize(("whole", "path"), [(False, "gate"), (True, "network")])
def test_what_was_skipped_is_printed_and_recorded(
    whole: bool, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "console", Console(width=200, record=True, quiet=False))
    target = f"model._target_={__name__}.gated_teacher"
    metrics = run_job(composed([*SMALL, target, f"+model.whole={whole}", "calibration=noise"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert set(facts["opaque"]) == {path}
    reason = facts["opaque"][path]
    assert "symbolically traced variables cannot be used as inputs to control flow" in reason
    printed = report.console.export_text()
    assert "not traced" in printed
    assert path in printed
    assert "control flow" in printed
    with (tmp_path / "quantizers.csv").open() as file:
        rows = list(csv.DictReader(file))
    inside = "gate.conv" if not whole else "network.gate.conv"
    assert any(row["name"] == inside and row["kind"] == "weight" for row in rows)
    assert 0 <= metrics["test/quantized/top1"] <= 100


def test_nothing_is_said_of_a_network_that_can_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "console", Console(width=200, record=True))
    run_job(composed([*SMALL, "calibration=noise", "reconstruction=none"], tmp_path))
    assert json.loads((tmp_path / "record.json").read_text())["opaque"] == {}
    assert "not traced" not in report.console.export_text()
