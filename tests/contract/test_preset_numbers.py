"""Every generator, as its yaml builds it, has the numbers that were published: steps, batch, rates, views."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from lightning_modules.generator import GeneratorModule
from networks.teachers import Teacher
from synthesis.generators import Latents
from synthesis.labels import SuperposedLabels
from synthesis.seeding import seeded
from synthesis.views import LowPass, RandomResizedCrop, View
from tests.configuration import composed, options
from tests.contract.published import PUBLISHED, Published

Built = Callable[[str], GeneratorModule]
GENERATORS = options("generator")
PRESETS = [name for name in GENERATORS if PUBLISHED.get(name) is not None]


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return instantiate(composed(["model=tiny"]).model)


@pytest.fixture(scope="module")
def built(teacher: Teacher) -> Built:
    """The preset as it stands, made once."""

    @cache
    def build(option: str) -> GeneratorModule:
        cfg = composed(["model=tiny", f"generator={option}"]).generator
        student = lambda: teacher.network  # noqa: E731  any network will do where one is compared with
        size = teacher.input_size
        return instantiate(cfg)(network=teacher.network, input_size=size, count=2, seed=0, student=student)

    return build


def numbers(option: str) -> Published:
    row = PUBLISHED[option]
    assert row is not None
    return row


@pytest.mark.parametrize("option", GENERATORS)
def test_the_table_knows_the_generator(option: str) -> None:
    assert option in PUBLISHED, "state its published numbers in tests/contract/published.py"


@pytest.mark.parametrize("option", [name for name in GENERATORS if PUBLISHED.get(name, ()) is None])
def test_noise_is_never_optimised(option: str, built: Built) -> None:
    module = built(option)
    assert module.steps == 0
    assert not module.has_work


@pytest.mark.parametrize("option", PRESETS)
def test_steps_batch_and_optimizer(option: str, built: Built) -> None:
    row, module = numbers(option), built(option)
    norms = 7  # of the tiny network
    batch = norms if row.batch is None else row.batch
    assert (module.steps, module.source.batch_size) == (row.steps, batch)
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        assert tuple(group["betas"]) == row.betas
        assert group["weight_decay"] == 0


@pytest.mark.parametrize("option", PRESETS)
def test_learning_rates_over_a_whole_batch_of_images(option: str, built: Built) -> None:
    row, module = numbers(option), built(option)
    optimizer, schedule = parts(module)
    module.last_loss.fill_(1.0)
    seen = []
    for _ in range(row.steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        module.lr_scheduler_step(schedule, None)
    assert len(row.curves) == len(optimizer.param_groups)
    expected = [[curve(done) for curve in row.curves] for done in range(row.steps)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("option", ["zeroq", "dsg_journal", "intraq", "genie", "propagated"])
def test_a_plateau_needs_a_loss_that_stands_still(option: str, built: Built) -> None:
    module = built(option)
    optimizer, schedule = parts(module)
    first = optimizer.param_groups[0]["lr"]
    for step in range(400):
        module.last_loss.fill_(0.999**step)
        module.lr_scheduler_step(schedule, None)
    assert optimizer.param_groups[0]["lr"] == first


def parts(module: GeneratorModule) -> tuple[Any, Any]:
    """Optimizer and schedule; stepping rates without an optimizer's step is no mistake here."""
    configured: Any = module.configure_optimizers()
    configured["optimizer"].step()
    return configured["optimizer"], configured["lr_scheduler"]["scheduler"]


@pytest.mark.parametrize("option", PRESETS)
def test_where_images_start_and_what_they_pass_through(option: str, built: Built) -> None:
    row, module = numbers(option), built(option)
    if isinstance(module.source, Latents):
        assert module.source.latents.shape == (row.batch, row.start)
    else:
        assert row.start == getattr(module.source, "init", getattr(module.source, "latent", None))
    crop: Any = module.view
    assert isinstance(crop, RandomResizedCrop) == row.crops
    if row.crops:
        assert (tuple(crop.scale), crop.flip, crop.probability) == ((0.5, 1.0), 0.5, 0.5)
    filter_: Any = module.finalize
    assert isinstance(filter_, LowPass) == (row.low_pass is not None)
    assert not row.low_pass or filter_.cutoff == row.low_pass
    surgery: Any = module.surgery
    assert row.swing == getattr(surgery, "reach", None)
    assert getattr(module.source, "clamped", False) == row.clamped
    labels: Any = module.labels
    assert labels.every_step == row.fresh
    assert row.mixed == ((labels.probability, labels.mixed) if isinstance(labels, SuperposedLabels) else None)


@pytest.mark.parametrize("option", [name for name in PRESETS if numbers(name).shifts])
def test_shifts_and_resolutions_of_each_stage(option: str, built: Built) -> None:
    row, module = numbers(option), built(option)
    start = 0
    for index, (shift, length) in enumerate(row.shifts):
        for step in (start, start + length - 1):
            assert farthest(module.view, step) == shift
            coarse = 2 if index < len(row.shifts) - 1 else 1
            assert module.view(torch.zeros(1, 1, 224, 224), seeded(0), step).shape[2] == 224 // coarse
        start += length
    assert start == row.steps


def test_the_journal_s_prior_sees_rolled_images(built: Built) -> None:
    priors = built("dsg_journal").priors
    assert farthest(priors["total_variation"].view, 0) == 30
    assert farthest(priors["l2"].view, 0) == 0  # whose norm no roll changes


def farthest(view: View, step: int) -> int:
    """The largest roll, in rows of what comes out, of images 224 pixels high."""
    image = torch.zeros(1, 1, 224, 8)
    image[0, 0, 112:114] = 1
    columns = [view(image, seeded("roll", draw), step)[0, 0, :, 0] for draw in range(400)]
    return max(abs(int(column.argmax()) - column.numel() // 2) for column in columns)
