"""The throughput benchmark runs to its end; its figures are for the csv, not for a test."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.table import read_rows
from benchmarks.throughput import StepTimer, fit_timed, keep, measure


def test_both_stages_are_measured_on_a_small_network() -> None:
    learned = ["reconstruction=brecq", "pipeline=calibrant_fast"]
    options = argparse.Namespace(steps=3, rounds=1, whole=2, generators=["dsg", "genie"], reconstruction=learned)
    rows = list(measure("cifar10_resnet20", options))
    names = ["brecq", "pipeline=calibrant_fast"]
    assert [row["preset"] for row in rows] == ["dsg", "genie", *names, "qdrop", "pipeline=calibrant_fast", *names]
    assert [row["steps"] for row in rows] == [3, 3, 3, 3, 3, 3, 2, 2]
    for row in rows:
        assert row["ratio"] > 0
        assert row["seconds_per_step"] > 0 < row["bare_seconds_per_step"]


def test_a_case_is_kept_at_once_in_place_of_its_old_row(tmp_path: Path) -> None:
    path = tmp_path / "throughput.csv"
    old = {"network": "a", "stage": "synthesis", "preset": "dsg", "ratio": 2.0}
    keep(old, path)
    keep({**old, "preset": "zeroq"}, path)
    keep({**old, "ratio": 1.5, "goal": 1.25}, path)
    assert read_rows(path) == [
        {"network": "a", "stage": "synthesis", "preset": "zeroq", "ratio": "2.0", "goal": ""},
        {"network": "a", "stage": "synthesis", "preset": "dsg", "ratio": "1.5", "goal": "1.25"},
    ]


class Sleeper(pl.LightningModule):
    """Steps whose length depends on the epoch, as blocks of a network do."""

    def __init__(self, seconds: tuple[float, ...]) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.zeros(()))

    def train_dataloader(self) -> DataLoader[int]:
        return DataLoader(list(range(4)))  # type: ignore[arg-type]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(self.seconds[self.current_epoch])
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_only_steps_of_the_asked_epoch_are_timed() -> None:
    module = Sleeper((0.001, 0.001, 0.05))
    assert fit_timed(module, epoch=2, max_epochs=3) >= 0.05  # a step cannot be shorter than its sleep


def test_the_first_interval_of_an_epoch_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, clock = StepTimer(epoch=1), iter([0.0, 9.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for epoch in (0, 1, 1, 1, 1):
        timer.on_train_batch_end(SimpleNamespace(current_epoch=epoch))  # type: ignore[arg-type]
    assert timer.marks == [0.0, 9.0, 10.0, 11.0]
    assert timer.seconds_per_step == 1.0
