"""Stage checkpoints: whole files, there until the job has saved what they led to; observers change no number."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.checkpoint import StageCheckpoint
from callbacks.progress import StageProgress


class Line(pl.LightningModule):
    stage = "line"

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)
        self.fail_at = fail_at

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("killed")
        return self.linear(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Line, callbacks: list[pl.Callback], folder: Path) -> None:
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(data, batch_size=2)  # pyright: ignore[reportArgumentType]
    pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=folder,
    ).fit(module, loader)  # fmt: skip


def test_a_killed_stage_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    with contextlib.suppress(RuntimeError):
        fit(Line(fail_at=2), [StageCheckpoint(str(tmp_path), every_seconds=0)], tmp_path)
    checkpoint = torch.load(tmp_path / "line.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2


def test_a_finished_stage_leaves_its_last_one(tmp_path: Path) -> None:
    fit(Line(), [StageCheckpoint(str(tmp_path), every_seconds=0)], tmp_path)
    assert [path.name for path in tmp_path.glob("line*")] == ["line.ckpt"]
    assert torch.load(tmp_path / "line.ckpt", weights_only=True)["global_step"] == 4


def test_observers_change_no_number(tmp_path: Path) -> None:
    watched, alone = Line(), Line()
    fit(watched, [StageProgress(), StageCheckpoint(str(tmp_path), every_seconds=0)], tmp_path)
    fit(alone, [], tmp_path)
    assert torch.equal(watched.linear.weight, alone.linear.weight)
