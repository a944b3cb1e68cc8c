from __future__ import annotations

import logging

import pytest
import pytorch_lightning as pl

from lightning_modules.reconstruction import build_reconstruction
from tests.reconstruction.students import images, resnet8, student_of


class Lengths(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps.append(int(trainer.num_training_batches))


def test_each_epoch_enters_its_unit_and_counts_its_steps(caplog: pytest.LogCaptureFixture) -> None:
    x = images(6)
    module, datamodule = build_reconstruction(
        conversion=student_of(resnet8(), x),
        images=x,
        seed=0,
        phases="weights_then_activations",
        iterations=3,
        activation_iterations=2,
        batch_size=2,
        drop=0.0,
    )
    lengths = Lengths()
    with caplog.at_level(logging.INFO, logger="datamodules.activations"):
        pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[lengths],
            **module.trainer_arguments(),
        ).fit(module, datamodule=datamodule)
    assert lengths.steps == [3] * 5 + [2] * 4
    assert datamodule.cache is None
    assert "activations of 6 images" in caplog.text
