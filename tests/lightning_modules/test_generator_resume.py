"""Synthesis that was stopped: a resumed run is the same run bit by bit, and checkpoints hold what that takes."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_modules.generator import GeneratorModule
from networks.cifar_resnet import CifarResNet
from tests.configuration import CONF
from tests.lightning_modules.synthesis_runs import (
    SIZE,
    Record,
    build,
    everything,
    make,
    trainer,
)
from tests.lightning_modules.training import Interrupt, InterruptAt


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("step", [1, 4, 6, 7, 11, 12, 17])
def test_resumed_run_is_bitwise_the_uninterrupted_run(network: CifarResNet, tmp_path: Path, step: int) -> None:
    whole, record = everything(network), Record()
    trainer(whole, callbacks=[record]).fit(whole)

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    stopped = everything(network)
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(step)], **keep).fit(stopped)

    resumed, rest = everything(network), Record()
    path = tmp_path / f"step={step}.ckpt"
    trainer(resumed, callbacks=[checkpoint, rest], **keep).fit(resumed, ckpt_path=path)
    assert rest.losses == record.losses[step:]
    assert rest.rates == record.rates[step:]
    assert all(torch.equal(a, b) for a, b in zip(rest.pixels, record.pixels[step:], strict=True))
    assert torch.equal(resumed.images, whole.images)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_stopped_by_max_steps_and_resumed(network: CifarResNet, tmp_path: Path) -> None:
    cosine = {"schedule": functools.partial(CosineAnnealingLR, T_max=6)}
    whole, stopped, resumed, late = (build(network, **cosine) for _ in range(4))
    trainer(whole).fit(whole)
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=9, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True, "callbacks": [checkpoint]}
    first = trainer(stopped, max_epochs=None, max_steps=9, **keep)
    first.fit(stopped)
    assert stopped.images[:4].isfinite().all()
    assert stopped.images[4:].isnan().all()
    trainer(resumed, **keep).fit(resumed, ckpt_path=tmp_path / "step=9.ckpt")
    assert torch.equal(resumed.images, whole.images)
    # after the fit Lightning has counted the epoch as done: better refused than images that were never made
    first.save_checkpoint(tmp_path / "late.ckpt")
    with pytest.raises(RuntimeError, match="expected batch 1 to be finished before batch 2"):
        trainer(late, **keep).fit(late, ckpt_path=tmp_path / "late.ckpt")


def test_a_new_fit_after_an_interrupted_one_starts_afresh(network: CifarResNet) -> None:
    module = build(network)
    with pytest.raises(Interrupt):
        trainer(module, callbacks=[InterruptAt(3)]).fit(module)
    trainer(module).fit(module)
    assert torch.equal(module.images, make(network).images)


def test_checkpoints_hold_no_weights_of_the_network(network: CifarResNet, tmp_path: Path) -> None:
    module = build(network, count=4)
    run = trainer(module)
    run.fit(module)
    run.save_checkpoint(tmp_path / "end.ckpt")
    keys = torch.load(tmp_path / "end.ckpt", weights_only=False)["state_dict"].keys()
    assert not any("conv" in key for key in keys)


def test_checkpoints_hold_the_finished_images_and_no_others(network: CifarResNet, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole = build(network)
    trainer(whole, callbacks=[checkpoint], enable_checkpointing=True).fit(whole)
    for step, finished in ((5, 0), (10, 4), (15, 8)):
        file = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert torch.equal(file["finished_images"], whole.images[:finished])
        stored = [*file["state_dict"].values(), file["finished_images"]]
        pixels = [t for t in stored if t.shape[1:] == SIZE]
        assert sum(t.untyped_storage().nbytes() for t in pixels) == 4 * (finished + 4) * math.prod(SIZE)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("preset", ["intraq_cifar10", "genie", "qimera"])
def test_generators_labels_and_margins_resume_bitwise(network: CifarResNet, tmp_path: Path, preset: str) -> None:
    def compose() -> GeneratorModule:
        config = OmegaConf.merge(OmegaConf.load(CONF / "generator" / f"{preset}.yaml"), {"steps": 4, "batch_size": 4})
        return instantiate(config)(network=network, input_size=SIZE, count=10, seed=0)

    whole = compose()
    trainer(whole).fit(whole)
    step = 6 if whole.batches > 1 else 2
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    keep = {"enable_checkpointing": True}
    stopped, resumed = compose(), compose()
    with pytest.raises(Interrupt):
        trainer(stopped, callbacks=[checkpoint, InterruptAt(step)], **keep).fit(stopped)
    trainer(resumed, callbacks=[checkpoint], **keep).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert torch.equal(resumed.images, whole.images)
