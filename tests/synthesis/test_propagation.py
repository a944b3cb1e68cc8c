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
    "sum": Wrapped(lambda x: x[:, :2] + x[:, 2:]),
    "difference": Wrapped(lambda x: x[:, :2] - x[:, 2:]),
    "product": Wrapped(lambda x: x[:, :2] * x[:, 2:]),
    "sum_behind_relu": Wrapped(lambda x: F.relu(x[:, :2]) + 2 * F.relu(x[:, 2:])),
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


class Disjoint(nn.Module):
    """No value is read twice, so that what is assumed holds: whole moments must then be right but for the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2, groups=CHANNELS)
        self.norm = batch_norm()
        self.grouped = nn.Conv2d(2, 2, 2, stride=2, groups=2)
        self.last = nn.Conv2d(2, 1, 3, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.last(self.grouped(x[:, :2] + 3 * x[:, 2:]))


class Mixed(nn.Module):
    """A residual block, two concatenated branches and a layer that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(CHANNELS, 16, 3), nn.BatchNorm2d(16)
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.narrow, self.wide = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu6(self.norm1(self.conv1(x))))))
        return self.last(torch.cat([F.silu(self.narrow(x)), self.wide(x)], 1))


def against_a_sample(network: nn.Module, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return, for each convolution, the error of its means in deviations and the ratio of deviations, (C,)."""
    height, width = images.shape[2:]
    found = propagate(network.eval(), (CHANNELS, height, width), PRIOR)
    outputs: dict[str, Tensor] = {}
    for name in found:
        network.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: outputs.update({name: output})
        )
    with torch.no_grad():
        network(images)
    errors = {}
    for name, x in outputs.items():
        var, mean = torch.var_mean(x, (0, 2, 3))
        errors[name] = (found[name].mean - mean) / var.sqrt(), (found[name].var / var).sqrt()
    return errors


def test_a_network_that_reads_no_value_twice_has_the_moments_of_a_sample() -> None:
    torch.manual_seed(0)
    for name, (error, ratio) in against_a_sample(Disjoint(), sample()).items():
        assert error.abs().max() < 0.05, name
        assert (ratio - 1).abs().max() < 0.05, name


@pytest.mark.parametrize("seed", [0, 1])
def test_a_small_network_has_about_the_moments_of_a_sample(seed: int) -> None:
    """Each mean within 0.3 deviations, each deviation within a third, half of the channels within a tenth."""
    torch.manual_seed(seed)
    network = settle(Mixed(), (CHANNELS, 32, 32), seed)
    images = torch.randn(60, CHANNELS, 32, 32) * PRIOR.var.sqrt().view(-1, 1, 1) + PRIOR.mean.view(-1, 1, 1)
    errors = against_a_sample(network, images)
    assert list(errors) == ["stem", "conv1", "conv2", "narrow", "wide", "last"]
    for name, (error, ratio) in errors.items():
        assert error.abs().max() < 0.3, name
        assert error.abs().median() < 0.1, name
        assert ratio.log().abs().max() < 0.33, name
        assert (ratio - 1).abs().median() < 0.1, name


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
