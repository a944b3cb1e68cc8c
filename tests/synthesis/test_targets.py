"""Stored targets, and slack as the percentile of the gap that noise has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from networks.cifar_resnet import CifarResNet
from synthesis.moments import Moments, Probe
from synthesis.seeding import seeded
from synthesis.targets import BNTargets, Slack

SIZE = (3, 8, 8)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = CifarResNet(8).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network


def test_targets_are_the_stored_statistics(network: nn.Module) -> None:
    targets = BNTargets().targets(network, SIZE, Probe())
    assert list(targets)[:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    for name, target in targets.items():
        layer = network.get_submodule(name)
        assert torch.equal(target.moments.mean, layer.running_mean)  # type: ignore[arg-type]
        assert torch.equal(target.moments.var, layer.running_var)  # type: ignore[arg-type]
        assert target.slack.mean.item() == target.slack.spread.item() == 0


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("reduction", ["sample", "batch", "all"])
def test_slack_of_the_first_layer_by_hand(network: nn.Module, reduction: Any, per_channel: bool) -> None:
    source = Slack(BNTargets(), percentile=0.75, images=12, batch_size=4, per_channel=per_channel, seed=3)
    slack = source.targets(network, SIZE, Probe(reduction, eps=1e-5))["bn1"].slack
    rng = seeded(3, "slack")
    noise = torch.cat([torch.randn(4, *SIZE, generator=rng) for _ in range(3)])
    x = network.conv1(noise).double().numpy()  # type: ignore[operator]
    groups = {
        "sample": x,
        "batch": x.reshape(3, 4, 16, 8, 8).transpose(0, 2, 1, 3, 4),
        "all": x.transpose(1, 0, 2, 3)[None],
    }
    rows = groups[reduction].reshape(*groups[reduction].shape[:2], -1)  # (rows, C, positions)
    bn = network.bn1
    gap_mean = np.abs(rows.mean(-1) - bn.running_mean.numpy())  # type: ignore[union-attr, operator]
    gap_std = np.abs(np.sqrt(rows.var(-1) + 1e-5) - np.sqrt(bn.running_var.numpy() + 1e-5))  # type: ignore[union-attr, operator]
    axis = 0 if per_channel else None
    np.testing.assert_allclose(slack.mean, np.percentile(gap_mean, 75, axis=axis), rtol=1e-4)
    np.testing.assert_allclose(slack.spread, np.percentile(gap_std, 75, axis=axis), rtol=1e-4)


def test_percentiles_by_hand() -> None:
    gap = torch.tensor([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0], [3.0, 40.0], [4.0, 50.0]])
    assert Slack(BNTargets(), percentile=0.9)._quantile(gap).item() == pytest.approx(41.0)
    assert Slack(BNTargets(), percentile=1.0, per_channel=True)._quantile(gap).tolist() == [4, 50]
    assert Slack(BNTargets(), percentile=0.5, per_channel=True)._quantile(gap).tolist() == [2, 30]


def test_slack_depends_on_its_seed_alone(network: nn.Module) -> None:
    def slack(seed: int, batch_size: int = 4) -> Any:
        source = Slack(BNTargets(), images=8, batch_size=batch_size, seed=seed)
        return source.targets(network, SIZE, Probe("sample"))["bn1"].slack.mean

    assert torch.equal(slack(0), slack(0))
    assert not torch.equal(slack(0), slack(1))


@pytest.mark.parametrize("wrong", [{"percentile": 90}, {"percentile": 0}, {"images": 0}, {"batch_size": 0}])
def test_slack_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Slack(BNTargets(), **wrong)  # type: ignore[arg-type]


def test_moments_are_copies_of_shape_c(network: nn.Module) -> None:
    target = BNTargets().targets(network, SIZE, Probe())["layer3.0.bn2"]
    assert isinstance(target.moments, Moments)
    assert target.moments.mean.shape == (64,)
