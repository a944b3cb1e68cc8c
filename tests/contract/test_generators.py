"""What every option of conf/generator must keep; a new yaml is held to it without a new test."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import open_dict

from lightning_modules.generator import GeneratorModule
from networks.teachers import Teacher
from synthesis.seeding import seeded
from tests.configuration import composed, options

GENERATORS = options("generator")
COUNT = 9


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return instantiate(composed(["model=tiny"]).model)


def build(option: str, teacher: Teacher, count: int = COUNT) -> GeneratorModule:
    """A preset with two steps, and with its published batch and noise images made small."""
    cfg = composed(["model=tiny", f"generator={option}"]).generator
    with open_dict(cfg):
        cfg.steps = min(cfg.steps, 2)
        cfg.batch_size = None if cfg.batch_size is None else min(cfg.batch_size, 4)
        if cfg.get("slack") is not None:
            cfg.slack.images = 8
    student = lambda: teacher.network  # noqa: E731  any network will do where one is compared with
    return instantiate(cfg)(
        network=teacher.network, input_size=teacher.input_size, count=count, seed=0, student=student
    )


def run(module: GeneratorModule) -> torch.Tensor:
    if not module.has_work:
        module.render()
        return module.images
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(accelerator="cpu", max_epochs=module.batches, enable_model_summary=False, **quiet).fit(module)
    return module.images


@pytest.mark.parametrize("option", GENERATORS)
def test_images_are_finite_repeatable_and_differ(option: str, teacher: Teacher) -> None:
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    images = run(build(option, teacher))
    assert images.shape == (COUNT, *teacher.input_size)
    assert images.isfinite().all()
    assert images.flatten(1).std(0).min() > 0  # no two alike, in any pixel
    torch.manual_seed(5)
    assert torch.equal(run(build(option, teacher)), images)
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in teacher.network.modules())


@pytest.mark.parametrize("option", GENERATORS)
def test_published_steps_and_batch_are_the_defaults(option: str) -> None:
    cfg = composed([f"generator={option}"]).generator
    assert cfg.steps in (0, 120, 500, 1000, 2000, 3000, 4000, 80000)
    assert cfg.batch_size is None or cfg.batch_size >= 16


@pytest.mark.parametrize("option", ["noise", "uniform_noise"])
def test_noise_stays_noise_when_a_sweep_sets_the_steps(option: str, teacher: Teacher) -> None:
    cfg = composed(["model=tiny", f"generator={option}", "generator.steps=7"]).generator
    module = instantiate(cfg)(network=teacher.network, input_size=teacher.input_size, count=3, seed=0)
    assert not module.has_work
    module.source.reset(seeded(0, "source", 0))
    fresh = module.source(seeded(0), torch.zeros(0)).detach()
    assert torch.equal(run(module), fresh[:3])
