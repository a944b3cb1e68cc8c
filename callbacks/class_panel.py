"""What a generator makes of each class while it is trained: a picture every few epochs, a row a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from callbacks.sample_grid import save_grid
from callbacks.wandb_run import WandbRun


class ClassPanel(pl.Callback):
    """Writes `<folder>/epoch_<n>.png`, and shows it in Weights & Biases, for modules that `has_panel`.

    Args:
        folder: where the pictures go.
        mean: of the teacher's normalisation.
        std: the same.
        every_epochs: between two pictures; the last epoch always has one.
        columns: images a class.
    """

    def __init__(
        self, folder: str, *, mean: Sequence[float], std: Sequence[float], every_epochs: int = 10, columns: int = 8
    ) -> None:
        if every_epochs < 1 or columns < 1:
            raise ValueError(f"every_epochs, columns: expected at least 1, got {every_epochs} and {columns}")
        self.folder = Path(folder)
        self.mean, self.std = list(mean), list(std)
        self.every_epochs = every_epochs
        self.columns = columns

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, module = trainer.current_epoch + 1, pl_module
        due = epoch % self.every_epochs == 0 or epoch == trainer.max_epochs
        if not (due and trainer.is_global_zero and getattr(module, "has_panel", False)):
            return
        drawn: Any = module.panel(self.columns)  # type: ignore[operator]
        path = self.folder / f"epoch_{epoch:04d}.png"
        save_grid(drawn, path, mean=self.mean, std=self.std, columns=self.columns)
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.log_image("distillation/classes", [str(path)], step=trainer.global_step)
