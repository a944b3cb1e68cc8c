"""What every option of conf/corrections must keep; a new yaml is held to it without a new test."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from deployment.student_file import load_student, save_student
from lightning_modules.corrections import Corrections
from quantizers.convert import Conversion
from quantizers.layer import output_first, quantized_layers
from tests.configuration import composed, options
from tests.corrections.networks import images, residual, student_of

OPTIONS = [option for option in options("corrections") if option != "none"]
QUIET = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def corrections(option: str) -> Corrections:
    settings = OmegaConf.to_container(composed([f"corrections={option}"]).corrections)
    assert isinstance(settings, dict)
    for step in settings.values():
        if "steps" in step:
            step["steps"] = 2
    return Corrections(instantiate(settings, _convert_="all"))


def corrected(option: str) -> tuple[Conversion, Corrections]:
    network, steps = residual(), corrections(option)
    conversion = student_of(network, bits=(2, 4), prepare=steps.prepare)
    job: Any = SimpleNamespace(
        device=torch.device("cpu"),
        cfg=SimpleNamespace(batch_size=5, seed=0),
        alone=partial(pl.Trainer, accelerator="cpu", logger=False, **QUIET),
        fit=lambda module, trainer: trainer.fit(module),
    )
    before = integers(conversion)
    steps.apply(job, network, conversion, images())
    assert all(torch.equal(a, b) for a, b in zip(before, integers(conversion), strict=True))
    return conversion, steps


def integers(conversion: Conversion) -> list[torch.Tensor]:
    layers = dict(quantized_layers(conversion.student)).values()
    return [layer.weight_quantizer.integers(output_first(layer.layer))[0] for layer in layers]


@pytest.mark.parametrize("option", OPTIONS)
def test_integers_stay_numbers_are_finite_and_the_student_file_holds_all(option: str, tmp_path: Path) -> None:
    conversion, steps = corrected(option)
    assert [entry["correction"] for entry in steps.applied]
    assert all(len(entry) > 1 for entry in steps.applied)
    logits = conversion.student(images())
    assert logits.isfinite().all()
    assert not logits.requires_grad
    path = save_student(conversion.student, tmp_path / "student.safetensors", {})
    fresh = student_of(residual(), bits=(2, 4), prepare=corrections(option).prepare).student
    load_student(fresh, path)
    assert torch.equal(fresh(images()), logits)
