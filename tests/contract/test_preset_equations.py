"""The first loss of every generator equals its published equation, written out with its published constants.

The numbers of a yaml and the parts it names are held to the paper together: a wrong weight, a sum where a mean belongs
or a missing term changes the loss. What the equations are applied to is kept by hooks (`first_step`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import open_dict
from torch import nn

from lightning_modules.generator import GeneratorModule
from networks.cifar_resnet import CifarResNet
from networks.random_weights import settle
from networks.teachers import Teacher
from synthesis.guidance import Answer, CosineMargin
from tests.configuration import composed, options
from tests.contract.equations import (
    BATCH,
    NOISE,
    Terms,
    adaptive,
    deepinversion,
    dsg,
    dsg_journal,
    gdfq,
    genie,
    hast,
    intraq,
    zeroq,
)
from tests.contract.equations_from_weights import gzsq, propagated
from tests.contract.first_step import FirstStep, first_step

EQUATIONS: dict[str, Callable[[FirstStep], Terms] | None] = {
    "zeroq": zeroq,
    "dsg": dsg,
    "dsg_fast": dsg,
    "dsg_journal": dsg_journal,
    "deepinversion": deepinversion,
    "deepinversion_cifar": lambda s: deepinversion(s, r=10.0, first=1.0, tv=2.5e-5, l2=0.0),
    "adaptive_deepinversion": adaptive,
    "intraq": lambda s: intraq(s, 1.0, 0.0, 2.0),
    "intraq_cifar10": lambda s: intraq(s, 0.95, 0.05, 0.8),
    "intraq_cifar100": lambda s: intraq(s, 0.6, 0.02, 1.0),
    "hast": lambda s: hast(s, 0.1, 0.5),
    "synq": lambda s: hast(s, 0.1, 0.5),
    "hast_cifar": lambda s: hast(s, 10.0, 2.0),
    "synq_cifar": lambda s: hast(s, 10.0, 2.0),
    "genie": genie,
    "calibrant": genie,
    "calibrant_fast": genie,
    "gdfq": gdfq,
    "gdfq_imagenet": gdfq,
    "qimera": gdfq,
    "qimera_imagenet": gdfq,
    "gzsq": gzsq,
    "propagated": propagated,
    "noise": None,
    "uniform_noise": None,
    "coloured_noise": None,
}

GENERATORS = options("generator")
PRESETS = [name for name in GENERATORS if EQUATIONS.get(name) is not None]
EXACT = 3e-6  # of the loss; every term must be large enough to be seen


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return instantiate(composed(["model=tiny"]).model)


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(1)
    return settle(CifarResNet(8, in_channels=1), (1, 28, 28), seed=1)


def built(option: str, teacher: Teacher, student: nn.Module) -> GeneratorModule:
    """The preset with few images and few noise images; steps as published, so that stages begin where they do."""
    cfg = composed(["model=tiny", f"generator={option}"]).generator
    with open_dict(cfg):
        cfg.batch_size = None if cfg.batch_size is None else BATCH
        if cfg.get("slack") is not None:
            assert cfg.slack.images == (256 if option == "dsg_fast" else 1024)
            cfg.slack.images = NOISE
    return instantiate(cfg)(
        network=teacher.network, input_size=teacher.input_size, count=BATCH, seed=0, student=lambda: student
    )


def kept_apart(module: GeneratorModule, step: FirstStep) -> None:
    """Give every class a centre of finished images: even ones near the features, odd ones opposite to them."""
    margin = module.guides.terms["margin"]
    classes = step.labels.argmax(1)
    signs = torch.where(classes % 2 == 0, 1.0, -1.0).unsqueeze(1)
    features = step.features.float() * signs
    rest = torch.eye(step.labels.shape[1])
    for labels, found in (
        (step.labels.float(), features),
        (1e-3 * rest, 1e-3 * features.mean(0).expand(len(rest), -1)),
    ):
        margin.remember(Answer(torch.zeros_like(labels), labels, found))
    module.guides.forget = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("option", GENERATORS)
def test_the_table_knows_the_generator(option: str) -> None:
    assert option in EQUATIONS, "write its published loss in tests/contract/equations.py"


@pytest.mark.parametrize("option", PRESETS)
def test_the_first_loss_is_the_published_one(option: str, teacher: Teacher, student: nn.Module) -> None:
    module = built(option, teacher, student)
    step = first_step(module, teacher.network, student)
    if isinstance(module.guides.terms.get("margin"), CosineMargin):
        module = built(option, teacher, student)
        kept_apart(module, step)
        step = first_step(module, teacher.network, student)
    equation = EQUATIONS[option]
    assert equation is not None
    terms: Terms = equation(step)
    total = sum(terms.values())
    assert step.loss == pytest.approx(total, rel=EXACT), terms
    assert all(value > 3 * EXACT * total for value in terms.values()), terms
