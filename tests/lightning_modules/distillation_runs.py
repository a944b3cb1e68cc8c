"""Runs of fine-tuning a small student, with a generator or real images, for tests."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from lightning_modules.distillation import DistillationModule
from lightning_modules.few_shot import FewShot
from lightning_modules.fine_tuning import build_distillation
from quantizers.layer import quantizers_of
from quantizers.moving_average import MovingAverage
from reconstruction.inundation import Inundation
from reconstruction.student_loss import StudentLoss
from synthesis.class_alignment import ClassAlignment
from synthesis.views import RandomResizedCrop
from tests.configuration import CONF
from tests.lightning_modules.training import quiet_trainer
from tests.reconstruction.students import images, student_of
from tests.reconstruction.test_learner import MOVING, TRAINED

SIZE = (1, 8, 8)
SGD = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3])
SHOTS = functools.partial(
    FewShot, batch_size=3, class_batch=4, untrusted=0.25, alignment=ClassAlignment, view=RandomResizedCrop()
)
FDDA: dict[str, Any] = {"few_shot": SHOTS, "view": RandomResizedCrop(probability=1.0), "images": images(11, seed=5)}
AIT: dict[str, Any] = {"loss": StudentLoss(cross_entropy=0.0), "inundation": Inundation(0.02)}
IMAGES: dict[str, Any] = {"generator": None, "warmup": 0, "few_shot": functools.partial(FewShot, batch_size=5)}


@functools.cache
def gdfq() -> Any:
    return OmegaConf.load(CONF / "generator" / "gdfq.yaml")


def generator(**arguments: Any) -> Any:
    """GDFQ's, for batches of six."""
    return instantiate(gdfq())(**(arguments | {"batch_size": 6}))


def build(teacher: nn.Module, **changes: Any) -> DistillationModule:
    """Three epochs of four steps of GDFQ, the first of them warm-up; `changes` go before that."""
    student = student_of(teacher, images(13), bits=(3, 4), weight=TRAINED, activation=MOVING)
    arguments: dict[str, Any] = {
        "images": images(11, seed=5),
        "labels": LABELS,
        "seed": 3,
        "epochs": 3,
        "warmup": 1,
        "steps": 4,
        "range_epochs": 1,
        "optimizer": SGD,
        "loss": StudentLoss(),
        "generator": generator,
    }
    return build_distillation(conversion=student, teacher=teacher, input_size=SIZE, **(arguments | changes))


def trainer(module: DistillationModule, **changes: Any) -> pl.Trainer:
    """A silent trainer as `module` needs it."""
    return quiet_trainer(**(module.trainer_arguments() | changes))


def fitted(teacher: nn.Module, **changes: Any) -> DistillationModule:
    """A module that is trained."""
    module = build(teacher, **changes)
    trainer(module).fit(module)
    return module


def state(module: DistillationModule) -> dict[str, Tensor]:
    """A copy of all tensors."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def observe(student: nn.Module, observing: bool) -> None:
    """Let moving ranges move, or keep them."""
    for _, quantizer in quantizers_of(student):
        if isinstance(quantizer, MovingAverage):
            quantizer.observing = observing
