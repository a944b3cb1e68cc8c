"""Propagated moments against large samples of independent normals, and through whole networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from corrections.outlier_splitting import OutlierSplitting
from networks.cifar_resnet import CifarResNet
from networks.random_weights import settle
from quantizers.fold import fold
from quantizers.trace import trace
from synthesis.moments import Moments
from synthesis.propagation import propagate, propagate_graph
from synthesis.statistics import execution_order

CHANNELS, SIDE, COUNT = 4, 12, 3000
PRIOR = Moments(torch.tensor([0.0, 0.5, -1.0, 2.0]), torch.tensor([1.0, 0.25, 4.0, 0.5]))


def sample() -> Tensor:
    noise = torch.randn(COUNT, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return noise * PRIOR.var.sqrt().view(-1, 1, 1) + PRIOR.mean.view(-1, 1, 1)


def output(network: nn.Module, prior: Moments, size: tuple[int, int, int], **options: Any) -> Moments:
    graph_module = trace(network, torch.zeros(1, *size)).graph_module
    found = propagate_graph(graph_module, prior, **options)
    last = next(node for node in graph_module.graph.nodes if node.op == "output").all_input_nodes[0]
    return found[last]


class Wrapped(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(CHANNELS))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.rand(CHANNELS) + 0.5)  # type: ignore[union-attr]
    return norm.eval()


EXACT: dict[str, Any] = {
    "conv": nn.Conv2d(CHANNELS, 6, 3),
    "strided": nn.Conv2d(CHANNELS, 6, 3, stride=2, dilation=2),
    "grouped": nn.Conv2d(CHANNELS, 8, 3, groups=2),
    "depthwise": nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, bias=False),
    "norm": batch_norm(),
    "relu": nn.ReLU(),
    "average": nn.AvgPool2d(2),
    "global": nn.AdaptiveAvgPool2d(1),
    "max": nn.MaxPool2d(3),
    "mean": Wrapped(lambda x: x.mean((2, 3))),
    "scale": Wrapped(lambda x: 3 * x + 1),
    "cat": Wrapped(lambda x: torch.cat([x, F.relu(x)], 1)),
    "pad": Wrapped(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))),
    "linear": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 5)),
    "double": Wrapped(lambda x: x + x),
}


@pytest.mark.parametrize("name", EXACT)
def test_operators_against_a_large_sample(name: str) -> None:
    network = EXACT[name].eval()
    with torch.no_grad():
        seen = network(sample())
    found = output(network, PRIOR, (CHANNELS, SIDE, SIDE))
    rows = seen.transpose(0, 1).flatten(1)
    scale = float(rows.std())
    torch.testing.assert_close(found.mean.float(), rows.mean(1), atol=0.03 * scale, rtol=0)
    torch.testing.assert_close(found.var.float(), rows.var(1), atol=0.03 * scale**2, rtol=0.06)


def test_a_gate_of_its_own_input_is_silu() -> None:
    product = output(Wrapped(lambda x: x * torch.sigmoid(x)), PRIOR, (CHANNELS, SIDE, SIDE))
    silu = output(nn.SiLU(), PRIOR, (CHANNELS, SIDE, SIDE))
    torch.testing.assert_close(product.mean, silu.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(product.var, silu.var, atol=1e-5, rtol=1e-4)


def test_stored_statistics_replace_what_arrives_at_a_batch_norm() -> None:
    network = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), batch_norm()).eval()
    found = output(network, PRIOR, (CHANNELS, SIDE, SIDE), stored=True)
    norm: Any = network[1]
    torch.testing.assert_close(found.mean.float(), norm.bias.detach())
    share = norm.running_var / (norm.running_var + norm.eps)
    torch.testing.assert_close(found.var.float(), norm.weight.detach().square() * share)


def test_an_unknown_operator_is_named_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"got 'cumsum' at node .*generator=zeroq"):
        output(Wrapped(lambda x: x.cumsum(1)), PRIOR, (CHANNELS, SIDE, SIDE))


def test_folding_changes_no_moments() -> None:
    torch.manual_seed(0)
    network, size = CifarResNet(8).eval(), (3, 16, 16)
    settle(network, size, 0)
    normal = Moments(torch.zeros(()), torch.ones(()))
    plain = propagate_graph(trace(network, torch.zeros(1, *size)).graph_module, normal)
    by_name = {node.name: moments for node, moments in plain.items()}
    folded = fold(network, torch.zeros(1, *size)).graph_module
    found = propagate(folded, size, normal)
    assert list(found) == list(execution_order(folded, size, "conv_output"))
    for path, moments in found.items():
        norm = by_name[path.replace(".", "_").replace("conv", "bn")]
        torch.testing.assert_close(moments.mean, norm.mean.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.var, norm.var.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("squeezenet1_1", 32),
        ("vgg11", 32),
        ("alexnet", 64),
        ("resnet18", 32),
        ("mobilenet_v2", 32),
        ("shufflenet_v2_x0_5", 32),
    ],
)
def test_whole_networks(name: str, side: int) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, num_classes=4).eval()
    found = propagate(network, (3, side, side), Moments(torch.zeros(3), torch.ones(3)))
    assert list(found) == list(execution_order(network, (3, side, side), "conv_output"))
    for path, moments in found.items():
        assert moments.mean.shape == (network.get_submodule(path).out_channels,)
        assert moments.mean.isfinite().all()
        assert (moments.var >= 0).all()
        assert moments.var.isfinite().all()


def test_split_channels_are_gathered() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval()
    plain, split = (fold(network, torch.zeros(1, 3, 6, 6)) for _ in range(2))
    OutlierSplitting(expand_ratio=0.5).prepare(split)
    prior = Moments(torch.zeros(()), torch.ones(()))
    ours, theirs = (propagate_graph(traced.graph_module, prior) for traced in (split, plain))
    last = [next(m.mean for n, m in found.items() if n.target == "2") for found in (ours, theirs)]
    torch.testing.assert_close(*last)
