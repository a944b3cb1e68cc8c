"""Checkpoints to resume from: one file a stage, replaced every minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class StageCheckpoint(pl.Callback):
    """Write `<folder>/<stage>.ckpt` every `every_seconds` at the end of a step, by a temporary name and a rename.

    The file is complete whenever it exists. It outlives its stage, since only the job knows when what the stage made is
    saved; from the last one a stage that was done already goes on at its end.

    Args:
        folder: where the checkpoints stand.
        every_seconds: least time between two of them; 0 writes one at every step.
    """

    def __init__(self, folder: str, every_seconds: float = 60.0) -> None:
        self.folder = Path(folder)
        self.every_seconds = every_seconds
        self.last = time.monotonic()

    def path(self, module: pl.LightningModule) -> Path:
        """The file of this module's stage."""
        return self.folder / f"{getattr(module, 'stage', type(module).__name__)}.ckpt"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        due = trainer.strategy.broadcast(time.monotonic() - self.last >= self.every_seconds)
        if due:
            self.save(trainer, pl_module)

    def save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file now; every process of a run has to call."""
        target = self.path(pl_module)
        target.parent.mkdir(parents=True, exist_ok=True)
        _count_epoch(trainer)
        temporary = target.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(target)
        self.last = time.monotonic()


def _count_epoch(trainer: pl.Trainer) -> None:
    """Count the epoch in work as begun.

    Lightning does not where it resumed from the last step of the epoch before, and from such a checkpoint it would take
    the steps since then once more.
    """
    progress = trainer.fit_loop.epoch_progress
    counts: tuple[Any, ...] = (progress.current, progress.total)
    for count in counts:
        count.ready = count.started = count.completed + 1
