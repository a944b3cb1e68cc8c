"""Hooks pair layers by identity, read BatchNorm's input and never outlive their `with`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks.cifar_resnet import CifarResNet
from synthesis.moments import Probe, moments
from synthesis.statistics import LayerStatistics, execution_order


class Shuffled(nn.Module):
    """Registers its layers in another order than it runs them, and one of them twice under two names."""

    def __init__(self, repeat: bool = False) -> None:
        super().__init__()
        self.last = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(4, 5, 3)
        self.first = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.unused = nn.BatchNorm2d(7)
        self.repeat = repeat
        self.inputs: dict[str, list[Tensor]] = {"first": [], "last": []}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.inputs["first"].append(x)
        x = self.first(x)
        if self.repeat:
            self.inputs["first"].append(2 * x)
            x = self.first(2 * x)
        x = self.conv2(x.relu())
        self.inputs["last"].append(x)
        return self.last(x)


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


def test_layers_are_paired_by_identity_and_in_order_of_execution() -> None:
    network = Shuffled().eval()
    with LayerStatistics(network, Probe("batch")) as seen:
        network(torch.randn(2, 3, 9, 9))
    assert list(seen) == ["first", "last"]
    for name, x in network.inputs.items():
        torch.testing.assert_close(seen[name], moments(x[0]))
    assert execution_order(network, (3, 9, 9)) == {"first": 4, "last": 5}


def test_a_layer_that_runs_twice_has_its_observations_merged() -> None:
    network = Shuffled(repeat=True).eval()
    with LayerStatistics(network, Probe("batch")) as seen:
        network(torch.randn(2, 3, 9, 9))
    torch.testing.assert_close(seen["first"], moments(torch.cat(network.inputs["first"])))


def test_no_hooks_left_also_after_an_exception() -> None:
    network = CifarResNet(8).eval()
    with LayerStatistics(network, Probe()):
        assert hooks(network) == 7
    assert hooks(network) == 0
    with pytest.raises(RuntimeError), LayerStatistics(network, Probe()):
        network(torch.zeros(1, 5, 8, 8))
    assert hooks(network) == 0


def test_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs no BatchNorm .*=propagated.*=gzsq.*calibration=none"):
        LayerStatistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Probe())
