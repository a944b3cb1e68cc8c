"""What every option of conf/distillation must keep; a new yaml is held to it without a new test."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from lightning_modules.distillation import DistillationModule
from networks.teachers import Teacher
from quantizers.layer import quantized_layers
from tests.configuration import CONF, composed, options
from tests.reconstruction.students import student_of
from tests.reconstruction.test_learner import MOVING, TRAINED

OPTIONS = [option for option in options("distillation") if option != "none"]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return instantiate(composed(["model=tiny"]).model)


def build(option: str, teacher: Teacher) -> DistillationModule:
    """An option with one step of warm-up, where it has any, and two of the student, on few images."""
    cfg = composed(["model=tiny", f"distillation={option}"]).distillation
    with open_dict(cfg):
        warm, images = min(cfg.warmup, 1), cfg.get("added_images", 0)
        cfg.epochs, cfg.warmup, cfg.steps = 2 + warm, 2 + warm if images else warm, 1
        if cfg.generator is not None:
            cfg.generator.batch_size = 4
        if cfg.few_shot is not None:
            cfg.few_shot.batch_size = 3
    x = torch.randn(10, *teacher.input_size, generator=torch.Generator().manual_seed(0))
    conversion = student_of(teacher.network, x, bits=(4, 4), weight=TRAINED, activation=MOVING)
    return instantiate(cfg)(
        conversion=conversion,
        teacher=teacher.network,
        input_size=teacher.input_size,
        images=x,
        labels=torch.arange(10),
        seed=0,
    )


class Weights(pl.Callback):
    """The free weights after the last step, before they are put onto their grid."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *arguments: Any) -> None:
        self.found = free_weights(pl_module)


def free_weights(module: DistillationModule) -> list[torch.Tensor]:
    return [
        layer.weight_quantizer.get_parameter("weight").detach().clone() for _, layer in quantized_layers(module.student)
    ]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_the_weights_to_a_finite_loss_or_makes_images(option: str, teacher: Teacher) -> None:
    module = build(option, teacher)
    before, after = free_weights(module), Weights()
    arguments: dict[str, Any] = QUIET | module.trainer_arguments() | {"callbacks": [after]}
    pl.Trainer(accelerator="cpu", **arguments).fit(module)
    if module.turns.student_steps == 0:
        assert all(torch.equal(one, other) for one, other in zip(before, after.found, strict=True))
        assert module.generated(5).isfinite().all()
        return
    assert math.isfinite(module.facts["loss_last_epoch"])
    assert module.facts["student_steps"] == 2
    assert not any(torch.equal(one, other) for one, other in zip(before, after.found, strict=True))
    assert not any(parameter.requires_grad for parameter in module.student.parameters())


def test_presets_have_the_published_numbers() -> None:
    def of(option: str) -> Any:
        return OmegaConf.to_container(composed([f"distillation={option}"]).distillation)

    gdfq, imagenet, ait, fdda = of("gdfq"), of("gdfq_imagenet"), of("ait"), of("fdda")
    assert (gdfq["epochs"], gdfq["steps"], gdfq["warmup"], gdfq["optimizer"]["lr"]) == (400, 200, 4, 1e-4)
    assert (gdfq["optimizer"]["momentum"], gdfq["optimizer"]["nesterov"]) == (0.9, True)
    assert (gdfq["loss"]["temperature"], gdfq["loss"]["divergence"], gdfq["loss"]["reduction"]) == (20.0, 1.0, "mean")
    assert gdfq["generator"] == OmegaConf.load(CONF / "generator" / "gdfq.yaml")
    assert (imagenet["warmup"], imagenet["optimizer"]["lr"], imagenet["generator"]["batch_size"]) == (50, 1e-6, 16)
    assert of("qimera")["generator"] == OmegaConf.load(CONF / "generator" / "qimera.yaml")
    assert (ait["loss"]["cross_entropy"], ait["inundation"]["share"]) == (0.0, 0.001)
    assert (fdda["loss"]["divergence"], fdda["loss"]["reduction"], fdda["schedule"]) == (20.0, "batchmean", "cosine")
    alignment = fdda["few_shot"]["alignment"]
    assert (alignment["central"], alignment["distorted"]) == (0.05, 0.9)
    assert (alignment["mean_noise"], alignment["var_noise"], alignment["relative"]) == (0.5, 1.0, False)
    assert fdda["generator"]["layer_weights"]["weight"] == 0.2
    assert fdda["generator"]["guidance"]["cross_entropy"]["weight"] == 0.5
    assert of("fdda_imagenet")["generator"]["source"]["conditioning"] == "batch_norm"
    assert of("images")["generator"] is None
