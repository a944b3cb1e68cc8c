"""Batches of images that end early, or go through stages: each is made whole, also when resumed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from lightning_modules.generator import GeneratorModule
from networks.cifar_resnet import CifarResNet
from synthesis.rates import Rates, WarmCosine
from synthesis.seeding import seeded
from synthesis.views import AveragePool, Identity, InTurn
from tests.lightning_modules.synthesis_runs import (
    SIZE,
    build,
    trainer,
)
from tests.lightning_modules.training import Interrupt, InterruptAt


class GlimpseOf(Callback):
    """Keeps the number of steps that each epoch took."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += [0] * (trainer.current_epoch + 1 - len(self.steps))
        self.steps[trainer.current_epoch] += 1


def coarse_first() -> InTurn:
    return InTurn([AveragePool(2), Identity()], [2, 1])


def test_early_stop_ends_a_batch_without_progress_and_keeps_its_images(network: CifarResNet) -> None:
    still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), "schedule": None, "count": 8, "steps": 200}
    module, glimpse = build(network, early_stop=50, **still), GlimpseOf()
    trainer(module, callbacks=[glimpse]).fit(module)
    assert glimpse.steps == [51, 51]  # looked at after 1, 26 and 51 steps
    expected = torch.cat([torch.randn(4, *SIZE, generator=seeded(0, "source", epoch)) for epoch in range(2)])
    assert torch.equal(module.images, expected)
    patient, whole = build(network, **still), GlimpseOf()
    trainer(patient, callbacks=[whole]).fit(patient)
    assert whole.steps == [200, 200]


def test_early_stop_leaves_no_coarse_stage_unfinished(network: CifarResNet) -> None:
    still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), "schedule": None, "count": 8, "steps": 210}
    module, glimpse = build(network, early_stop=25, view=coarse_first(), **still), GlimpseOf()
    trainer(module, callbacks=[glimpse]).fit(module)
    assert glimpse.steps == [176, 176]  # fine from 140 on, so looked at after 151 and 176 steps


class SaveAtEpochEnd(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path / "epoch.ckpt")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("place", ["step=26", "epoch", "step=29"])
def test_a_batch_after_one_that_ended_early_is_whole_also_when_resumed(
    network: CifarResNet, tmp_path: Path, place: str
) -> None:
    """The first batch stands still and ends after 26 of 30 steps; so does each other one, and none is left unmade."""
    still = {"optimizer": functools.partial(torch.optim.SGD, lr=0.0), "schedule": None, "count": 12, "steps": 30}
    module, glimpse = build(network, early_stop=25, **still), GlimpseOf()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    trainer(module, callbacks=[glimpse, checkpoint, SaveAtEpochEnd(tmp_path)], **keep).fit(module)
    assert glimpse.steps == [26, 26, 26]
    expected = torch.cat([torch.randn(4, *SIZE, generator=seeded(0, "source", epoch)) for epoch in range(3)])
    assert torch.equal(module.images, expected)
    resumed = build(network, early_stop=25, **still)
    trainer(resumed, callbacks=[checkpoint], **keep).fit(resumed, ckpt_path=tmp_path / f"{place}.ckpt")
    assert torch.equal(resumed.images, expected)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("step", [1, 4, 5])
def test_resumed_on_either_side_of_a_stage_is_bitwise_the_uninterrupted_run(
    network: CifarResNet, tmp_path: Path, step: int
) -> None:
    def compose() -> GeneratorModule:
        rates = functools.partial(Rates, rates=[WarmCosine([2000, 1000])])
        return build(network, view=coarse_first(), schedule=rates, early_stop=25, count=4)

    whole, stopped, resumed = (compose() for _ in range(3))
    trainer(whole).fit(whole)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(step)], enable_checkpointing=True).fit(stopped)
    path = tmp_path / f"step={step}.ckpt"
    trainer(resumed, callbacks=[checkpoint], enable_checkpointing=True).fit(resumed, ckpt_path=path)
    assert torch.equal(resumed.images, whole.images)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_early_stop_resumes_where_it_was(network: CifarResNet, tmp_path: Path) -> None:
    slow = {"optimizer": functools.partial(torch.optim.SGD, lr=1e-5), "schedule": None, "count": 4, "steps": 90}
    whole, stopped, resumed = (build(network, early_stop=25, **slow) for _ in range(3))
    glimpse = GlimpseOf()
    trainer(whole, callbacks=[glimpse]).fit(whole)
    assert glimpse.steps == [26]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(1)], **keep).fit(stopped)
    trainer(resumed, callbacks=[checkpoint], **keep).fit(resumed, ckpt_path=tmp_path / "step=1.ckpt")
    assert torch.equal(resumed.images, whole.images)
