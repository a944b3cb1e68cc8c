"""Stopping a job in the midst of a stage, in the process of the test."""

from __future__ import annotations

from typing import Any, ClassVar

import pytorch_lightning as pl


class Kill(pl.Callback):
    """Stop the stage `stage` after `step` steps, once, if armed."""

    armed: ClassVar[bool] = False

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if Kill.armed and pl_module.stage == self.stage and trainer.global_step == self.step:
            Kill.armed = False
            raise InterruptedError("killed")


def killing(stage: str, step: int) -> str:
    """The override that adds it."""
    return f"+callbacks.kill={{_target_: {__name__}.Kill, stage: {stage}, step: {step}}}"
