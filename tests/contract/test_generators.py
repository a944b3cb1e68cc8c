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


def build(option: str, teacher: Teacher, *overrides: str, count: int = COUNT, steps: int = 2) -> GeneratorModule:
    """A preset with two steps, and with its published batch and noise images made small."""
    cfg = composed(["model=tiny", f"generator={option}", *overrides]).generator
    with open_dict(cfg):
        cfg.steps = min(cfg.steps, steps)
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


@pytest.mark.parametrize("option", GENERATORS)
def test_any_number_of_steps_ends_at_full_resolution(option: str, teacher: Teacher) -> None:
    images = torch.zeros(2, *teacher.input_size)
    for steps in (1, 2, 7, 200):
        module = build(option, teacher, steps=steps)
        assert module.view.settled_from < max(module.steps, 1)
        assert module.view(images, seeded(0), module.steps - 1).shape == images.shape


@pytest.mark.parametrize("option", GENERATORS)
def test_says_how_it_runs_without_a_new_key(option: str, teacher: Teacher) -> None:
    module = build(option, teacher, "generator.early_stop=50", "generator.channels_last=true", "generator.surgery=null")
    assert module.settling.patience == 50
    convolutions = [m for m in module.alignment.network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    compiled = build(option, teacher, "generator.compile=eager", "generator.surgery=null", "generator.finalize=null")
    assert compiled.compile_backend == "eager"


@pytest.mark.parametrize(
    ("option", "ends"),
    [
        ("deepinversion", [2000, 3000]),
        ("adaptive_deepinversion", [2000, 3000]),
        ("deepinversion_cifar", [2000]),
        ("gdfq", [20000, 40000, 60000, 80000]),
        ("gdfq_imagenet", [20000, 40000, 60000, 80000]),
        ("qimera", [20000, 40000, 60000, 80000]),
        ("qimera_imagenet", [20000, 40000, 60000, 80000]),
    ],
)
def test_published_stages_are_those_of_the_published_steps(option: str, ends: list[int]) -> None:
    cfg = composed([f"generator={option}"]).generator
    stages = [instantiate(rate).stages for rate in cfg.schedule.rates]
    if "shares" in cfg.view:
        stages.append(instantiate(cfg.view).stages)
    for found in stages:
        found.plan(cfg.steps)
        assert found.ends == ends


@pytest.mark.parametrize("option", ["noise", "uniform_noise"])
def test_noise_stays_noise_when_a_sweep_sets_the_steps(option: str, teacher: Teacher) -> None:
    cfg = composed(["model=tiny", f"generator={option}", "generator.steps=7"]).generator
    module = instantiate(cfg)(network=teacher.network, input_size=teacher.input_size, count=3, seed=0)
    assert not module.has_work
    module.source.reset(seeded(0, "source", 0))
    fresh = module.source(seeded(0), torch.zeros(0)).detach()
    assert torch.equal(run(module), fresh[:3])


@pytest.mark.parametrize(("option", "parts"), [("dsg", (True, True, False)), ("dsg_journal", (True, True, True))])
def test_presets_of_dsg_have_the_parts_of_their_paper(option: str, parts: tuple[bool, ...]) -> None:
    generator = composed([f"generator={option}"]).generator
    assert (generator.sda, generator.lse, generator.sci) == parts
