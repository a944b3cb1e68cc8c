"""Synthesis runs: the loss falls, seeds decide, images are the last parameters, presets have their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger

from networks.cifar_resnet import CifarResNet
from synthesis.criteria import LayerwiseEnhancement
from synthesis.moments import Probe
from synthesis.seeding import seeded
from synthesis.targets import Slack
from synthesis.views import RandomResizedCrop
from tests.configuration import CONF
from tests.lightning_modules.synthesis_runs import (
    PLATEAU,
    SIZE,
    Record,
    build,
    everything,
    make,
    trainer,
)


def test_agrees_with_a_plain_loop(network: CifarResNet) -> None:
    module = make(network, count=8)
    expected = []
    for epoch in range(2):
        pixels = torch.randn(4, *SIZE, generator=seeded(0, "source", epoch)).requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=0.1)
        schedule = PLATEAU(optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            loss = torch.stack(list(module.alignment(pixels).values())).sum()
            loss.backward()
            optimizer.step()
            schedule.step(loss.item())
        expected.append(pixels.detach())
    assert torch.equal(module.images, torch.cat(expected))


def test_loss_falls_in_every_batch_and_rates_restart(network: CifarResNet) -> None:
    module, record = build(network, steps=30, count=8), Record()
    trainer(module, callbacks=[record]).fit(module)
    for epoch in range(2):
        losses = record.losses[30 * epoch : 30 * (epoch + 1)]
        assert losses[-1] < 0.5 * losses[0]
    assert record.rates[0] == record.rates[30] == 0.1
    assert record.rates[29] < 0.1


def test_images_are_the_parameters_after_the_last_step_and_the_last_batch_is_truncated(network: CifarResNet) -> None:
    module, record = build(network), Record()
    trainer(module, callbacks=[record]).fit(module)
    assert module.batches == 3
    assert torch.equal(module.images, torch.cat(record.pixels[5::6])[:10])


def test_seed_decides(network: CifarResNet) -> None:
    first = make(network, view=RandomResizedCrop())
    torch.manual_seed(99)
    assert torch.equal(make(network, view=RandomResizedCrop()).images, first.images)
    other = make(network, view=RandomResizedCrop(), seed=1)
    assert not torch.isclose(other.images, first.images).any(dim=0).all()
    assert not torch.equal(first.images[:4], first.images[4:8])


def test_network_is_left_as_it_was(network: CifarResNet) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    make(network, count=4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(part._forward_pre_hooks for part in network.modules())
    assert not network.training


def test_metrics_are_logged_at_the_trainers_rhythm(network: CifarResNet) -> None:
    class Memory(Logger):
        name, version = "test", 0  # type: ignore[assignment]

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.seen.append((step or 0, metrics))

        def log_hyperparams(self, *arguments: Any, **named: Any) -> None: ...

    module, logger = everything(network), Memory()
    trainer(module, logger=logger, log_every_n_steps=4).fit(module)
    assert [step for step, _ in logger.seen] == [3, 7, 11, 15]
    names = {"loss", "lr", "alignment", "total_variation", "decorrelation"}
    assert {f"synthesis/{name}" for name in names} <= logger.seen[0][1].keys()


@pytest.mark.parametrize("preset", ["zeroq", "dsg", "dsg_journal"])
def test_presets_run(network: CifarResNet, preset: str) -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / "generator" / f"{preset}.yaml"), {"steps": 2})
    if config.slack is not None:
        config.slack.images = 8
    module = instantiate(config)(network=network, input_size=SIZE, count=9, seed=0)
    trainer(module).fit(module)
    assert module.images.shape == (9, *SIZE)
    assert module.images.isfinite().all()
    assert module.source.batch_size == {"zeroq": 64, "dsg": 7, "dsg_journal": 7}[preset]
    parts = (type(module.alignment.targets).__name__, type(module.alignment.layer_weights).__name__, *module.priors)
    assert (
        parts
        == {
            "zeroq": ("BNTargets", "Uniform"),
            "dsg": ("Slack", "LayerwiseEnhancement"),
            "dsg_journal": ("Slack", "LayerwiseEnhancement", "total_variation", "l2", "decorrelation"),
        }[preset]
    )


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        ("dsg", {"sda": False}),
        ("dsg", {"lse": False, "batch_size": 3}),
        ("dsg_journal", {"sci": False, "priors": {"l2": None}}),
        ("dsg_journal", {"lse": False, "batch_size": 40}),
    ],
)
def test_parts_can_be_switched_off(network: CifarResNet, preset: str, change: dict[str, Any]) -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / "generator" / f"{preset}.yaml"), change)
    module = instantiate(config)(network=network, input_size=SIZE, count=3, seed=0)
    assert ("decorrelation" in module.priors) == config.sci
    assert not set(change.get("priors", {})) & set(module.priors)
    assert (type(module.alignment.targets).__name__ == "Slack") == config.sda
    assert (type(module.alignment.layer_weights).__name__ == "LayerwiseEnhancement") == config.lse


def test_a_part_that_is_not_there_cannot_be_switched_on(network: CifarResNet) -> None:
    config = OmegaConf.merge(OmegaConf.load(CONF / "generator" / "dsg.yaml"), {"slack": None})
    with pytest.raises(ValueError, match=r"generator\.slack: expected a part"):
        instantiate(config)(network=network, input_size=SIZE, count=3, seed=0)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({}, r"batch_size: layer-wise enhancement .* \(7\), got 4\. Set generator\.batch_size=null"),
        (
            {"batch_size": None, "probe": Probe("batch")},
            r"reduction: layer-wise .* Set generator\.probe\.reduction=sample",
        ),
    ],
)
def test_enhancement_that_cannot_be_is_refused_before_anything_is_measured(
    network: CifarResNet, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], remedy: str
) -> None:
    monkeypatch.setattr("synthesis.targets.Slack.targets", lambda *arguments: pytest.fail("measured"))
    with pytest.raises(ValueError, match=remedy):
        build(network, layer_weights=LayerwiseEnhancement(), slack=Slack, **change)
