"""An observer for jobs that are to be met in the midst of reconstruction."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_modules.interruption import restarted

STEP = "step"  # in the job's folder: its process and the steps taken


class Pace(pl.Callback):
    """Takes `seconds` for each step of the reconstruction, in a job's first try, and writes down where it is."""

    def __init__(self, seconds: float, folder: str) -> None:
        self.seconds, self.path = seconds, Path(folder) / STEP

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if pl_module.stage != "reconstruction" or restarted():
            return
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{os.getpid()} {trainer.global_step}")
        temporary.replace(self.path)
        time.sleep(self.seconds)


def paced(seconds: float) -> str:
    """The override that adds it."""
    return f"+callbacks.pace={{_target_: {__name__}.Pace, seconds: {seconds}, folder: '${{paths.output}}'}}"


def where(folder: Path) -> tuple[int, int]:
    """Process and steps of a job; zeros before it has come there."""
    path = folder / STEP
    process, step = path.read_text().split() if path.exists() else ("0", "0")
    return int(process), int(step)
