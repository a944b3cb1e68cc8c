"""Runs of reconstruction on a small network, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.block_reconstruction import BlockReconstructionModule
from lightning_modules.reconstruction import build_reconstruction
from quantizers.convert import Conversion
from reconstruction.fisher import DiagonalFisher
from reconstruction.objectives import PowerError
from reconstruction.prediction_difference import PredictionDifference
from tests.lightning_modules.training import quiet_trainer

SETTINGS: dict[str, Any] = {
    "iterations": 5,
    "batch_size": 4,
    "forward_batch_size": 16,
    "regularizer_weight": 0.1,
    "seed": 3,
}
OBJECTIVES = {"mse": PowerError(), "lp": PowerError(2.4), "fisher": DiagonalFisher(), "pd": PredictionDifference()}


def trainer_of(module: BlockReconstructionModule, **arguments: Any) -> pl.Trainer:
    """A silent trainer as `module` needs it."""
    return quiet_trainer(devices=1, **(module.trainer_arguments() | arguments))


def learn(conversion: Conversion, x: Tensor, *, trainer: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """Reconstruct the student of `conversion` on the images `x`; the module, with its results."""
    module, datamodule = build_reconstruction(conversion=conversion, images=x, **(SETTINGS | arguments))
    trainer_of(module, **(trainer or {})).fit(module, datamodule=datamodule)
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks are equal, bit by bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class KillAndWatch(pl.Callback):
    """Save and raise after step `kill`; note parameters, Adam's moments and learning rates after step `watch`."""

    def __init__(self, kill: int | None, watch: int, path: Path | None = None) -> None:
        self.kill, self.watch, self.path = kill, watch, path
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.watch:
            parameters = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            states = [v for p in parameters for v in trainer.optimizers[0].state.get(p, {}).values()]
            self.seen = [t.detach().clone() for t in (*parameters, *states)]
            self.seen += [torch.tensor([group["lr"] for group in trainer.optimizers[0].param_groups])]
        if trainer.global_step == self.kill:
            if self.path is not None:
                trainer.save_checkpoint(self.path)
            raise InterruptedError("killed")
