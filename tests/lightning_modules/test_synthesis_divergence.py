"""Losses and images that are not finite: refused with the step and the layer where it began."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from networks.cifar_resnet import CifarResNet
from tests.lightning_modules.synthesis_runs import (
    build,
    make,
    trainer,
)
from tests.lightning_modules.training import Interrupt, InterruptAt


def test_divergence_names_step_and_place(network: CifarResNet) -> None:
    with pytest.raises(RuntimeError, match=r"batch 0; it began at step 1 .* not finite: the images"):
        make(network, optimizer=functools.partial(torch.optim.SGD, lr=1e30), schedule=None)
    with torch.no_grad():
        network.layer2[0].conv1.weight.fill_(3e38)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match=r"at step 0 .* layer 'layer2\.0\.bn1'"):
        make(network)


class Poison(Callback):
    """Spoils what one layer answers in step `step` of batch `epoch`, and in no other."""

    def __init__(self, layer: torch.nn.Module, epoch: int, step: int) -> None:
        self.when, self.armed = (epoch, step), False
        layer.register_forward_hook(lambda module, inputs, output: output * math.nan if self.armed else None)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.armed = (trainer.current_epoch, batch_idx) == self.when


def test_divergence_between_two_looks_names_the_step_and_layer_where_it_began(network: CifarResNet) -> None:
    poison = Poison(network.layer2[0].conv1, epoch=1, step=7)  # type: ignore[union-attr, arg-type]
    module = build(network, steps=60)
    with pytest.raises(RuntimeError, match=r"nan in batch 1; it began at step 7 .* layer 'layer2\.0\.bn1'"):
        trainer(module, callbacks=[poison]).fit(module)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_where_divergence_began_survives_a_resume(network: CifarResNet, tmp_path: Path) -> None:
    poison = Poison(network.layer3[0].conv1, epoch=0, step=3)  # type: ignore[union-attr, arg-type]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    stopped, resumed = build(network, steps=60), build(network, steps=60)
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[poison, checkpoint, InterruptAt(5)], enable_checkpointing=True).fit(stopped)
    with pytest.raises(RuntimeError, match=r"it began at step 3 .* layer 'layer3\.0\.bn1'"):
        trainer(resumed, callbacks=[checkpoint], enable_checkpointing=True).fit(
            resumed, ckpt_path=tmp_path / "step=5.ckpt"
        )


def test_images_that_only_the_last_step_spoils_are_refused(network: CifarResNet) -> None:
    class Last(Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 5:
                pl_module.source.pixels.grad.fill_(math.nan)

    module = build(network)
    with pytest.raises(RuntimeError, match=r"it began at step 5 .* not finite: the images after it"):
        trainer(module, callbacks=[Last()]).fit(module)
