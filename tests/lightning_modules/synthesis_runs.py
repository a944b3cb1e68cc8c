"""A small network, and runs of synthesis on it, for tests."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_modules.generator import GeneratorModule
from lightning_modules.synthesis import build_generator
from networks.cifar_resnet import CifarResNet
from synthesis.decorrelation import Decorrelation
from synthesis.moments import Probe
from synthesis.priors import TotalVariation
from synthesis.sources import Pixels
from synthesis.targets import Slack
from synthesis.views import RandomResizedCrop, RollFlip
from tests.lightning_modules.training import quiet_trainer

SIZE = (3, 8, 8)
PLATEAU = functools.partial(ReduceLROnPlateau, patience=1, factor=0.5, threshold=0.05)


def trained() -> CifarResNet:
    """A small network whose BatchNorm layers have seen uniform noise."""
    torch.manual_seed(0)
    network = CifarResNet(8)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, *SIZE))
    return network.eval()


def build(network: CifarResNet, **changes: Any) -> GeneratorModule:
    """Ten images in batches of four, six steps each, of bare pixels; `changes` go before that."""
    arguments: dict[str, Any] = {
        "count": 10,
        "seed": 0,
        "steps": 6,
        "batch_size": 4,
        "source": Pixels,
        "optimizer": functools.partial(torch.optim.Adam, lr=0.1),
        "schedule": PLATEAU,
        "probe": Probe("sample", unbiased=True),
        "input_weight": 1.0,
    }
    return build_generator(network, SIZE, **(arguments | changes))


def trainer(module: GeneratorModule, **changes: Any) -> pl.Trainer:
    """A silent trainer for the whole of `module`."""
    return quiet_trainer(**({"max_epochs": module.batches} | changes))


def make(network: CifarResNet, **changes: Any) -> GeneratorModule:
    """A module whose images are made."""
    module = build(network, **changes)
    trainer(module).fit(module)
    return module


class Record(Callback):
    """Keeps loss, learning rate and pixels of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.pixels: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.pixels.append(pl_module.source.pixels.detach().clone())


def everything(network: CifarResNet) -> GeneratorModule:
    """A module in which every part draws, remembers or changes something."""
    return build(
        network,
        probe=Probe("all"),
        slack=functools.partial(Slack, images=8),
        source=functools.partial(Pixels, clamp=(-1.5, 1.5)),
        view=RandomResizedCrop(probability=0.5),
        priors={"total_variation": TotalVariation(0.01, RollFlip(2)), "none": None},
        decorrelation=Decorrelation,
    )
