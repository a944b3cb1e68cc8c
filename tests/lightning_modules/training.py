"""Training in tests: a Trainer that leaves nothing behind, and a way to stop one in the midst of an epoch."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


def quiet_trainer(**arguments: Any) -> pl.Trainer:
    """On the CPU, without loggers, checkpoints, progress bar and summary unless `arguments` ask for them."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(quiet | arguments))


class Interrupt(Exception):  # noqa: N818  not an error
    pass


class InterruptAt(Callback):
    """Ends training before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise Interrupt
