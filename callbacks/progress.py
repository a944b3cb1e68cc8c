"""A progress bar that names the stage and the unit in work, with the time left."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

REFRESH_STEPS = 10


class StageProgress(pl.Callback):
    """One bar a stage: `stage`, what is in work (`module.progress_label`), steps, elapsed time and ETA.

    A module may have `stage` (a short name) and `progress_label` (what is in work now); both are optional.
    On a terminal the bar moves; elsewhere one line is printed at the end of each stage.
    """

    def __init__(self, refresh_steps: int = REFRESH_STEPS) -> None:
        self.refresh_steps = refresh_steps
        self.console = Console()
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def _start(self, description: str, total: float | None) -> None:
        self._stop()
        columns = (
            TextColumn("{task.description:<40}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, refresh_per_second=4)
        self.progress.start()
        self.task = self.progress.add_task(description, total=total)

    def _stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.progress = None

    def _move(self, module: pl.LightningModule, completed: int) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=completed, description=describe(module))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            steps = getattr(pl_module, "total_steps", None)
            self._start(describe(pl_module), steps)
            self._move(pl_module, trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.refresh_steps == 0:
            self._move(pl_module, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._move(pl_module, trainer.global_step)
        self._stop()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._start(describe(pl_module), sum(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        self._move(pl_module, batch_idx + 1)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()


def describe(module: pl.LightningModule) -> str:
    """`stage label`, from whatever the module offers."""
    stage = getattr(module, "stage", type(module).__name__)
    label = getattr(module, "progress_label", "")
    return f"{stage} {label}".strip()
