"""A network whose layers report by themselves shows what hooks show."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from networks.cifar_resnet import CifarResNet
from networks.fixup_resnet import FixupResNet
from quantizers.fold import fold
from synthesis.features import ClassifierInput
from synthesis.look import WatchedNetwork, look_through
from synthesis.moments import Probe
from synthesis.statistics import Site, execution_order

SIZE = (3, 8, 8)


class Twice(nn.Module):
    """Runs one BatchNorm twice, on maps of two sizes, and holds it under two names; its classifier is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.again = nn.Sequential(nn.AvgPool2d(2), self.bn)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(self.bn(self.first(x)))).mean((2, 3))


def networks() -> dict[str, tuple[nn.Module, Site]]:
    torch.manual_seed(0)
    folded = fold(CifarResNet(8).eval(), torch.zeros(1, *SIZE)).graph_module
    return {
        "resnet": (CifarResNet(8), "bn_input"),
        "fixup": (FixupResNet(8), "conv_output"),
        "folded": (folded, "conv_output"),
        "twice": (Twice(), "bn_input"),
        "twice_at_convolutions": (Twice(), "conv_output"),
    }


@pytest.mark.parametrize("case", networks())
@pytest.mark.parametrize("reduction", ["sample", "batch"])
def test_layers_that_report_show_what_hooks_show(case: str, reduction: Literal["sample", "batch"]) -> None:
    network, site = networks()[case]
    network.eval()
    probe, layers = Probe(reduction), tuple(execution_order(network, SIZE, site))
    features = ClassifierInput(network, SIZE)
    modules = list(network.modules())
    watched = WatchedNetwork(network, layers, probe=probe, site=site, classifier=features.classifier)
    assert list(network.modules()) == modules  # the network itself is not rewritten
    assert {p.data_ptr() for p in watched.parameters()} == {p.data_ptr() for p in network.parameters()}
    images = torch.randn(5, *SIZE)
    expected = look_through(network, images, layers, probe=probe, site=site, features=features)
    for _ in range(2):  # nothing is left of an earlier pass
        found = watched(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert expected.features is not None
    assert expected.moments.mean.shape[0] == (5 if reduction == "sample" else 1)


def test_without_a_classifier_there_are_no_features() -> None:
    network = CifarResNet(8).eval()
    layers = tuple(execution_order(network, SIZE))
    watched = WatchedNetwork(network, layers, probe=Probe(), site="bn_input", classifier=None)
    assert watched(torch.randn(2, *SIZE)).features is None
