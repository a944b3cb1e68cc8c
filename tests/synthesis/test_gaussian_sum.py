"""Which layer another one inherits from, on small networks whose sums are done by hand."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from networks.cifar_resnet import CifarResNet
from networks.random_weights import settle
from quantizers.fold import fold
from synthesis.moments import Moments, Probe
from synthesis.weight_statistics import Adjustment, WeightGaussian

Normal = tuple[list[float], list[float]]  # means and variances, one a channel
SIZE = (2, 8, 8)
IMAGE: Normal = ([0.0, 0.0], [1.0, 1.0])


def behind(layer: nn.Module, before: Normal) -> Normal:
    """Mean and variance of each filter, and its bias, on top of what enters channel by channel; else of its mean."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    means, variances = before
    if layer.weight.shape[0] != len(means):
        deviation = statistics.fmean(v**0.5 for v in variances)
        means = [statistics.fmean(means)] * layer.weight.shape[0]
        variances = [deviation**2] * len(means)
    filters = [row.flatten().tolist() for row in layer.weight]
    biases = [0.0] * len(filters) if layer.bias is None else layer.bias.tolist()
    return (
        [statistics.fmean(f) + b + m for f, b, m in zip(filters, biases, means, strict=True)],
        [statistics.pvariance(f) + v for f, v in zip(filters, variances, strict=True)],
    )


def found(network: nn.Module, adjustment: Adjustment = "mean", size: tuple[int, int, int] = SIZE) -> dict[str, Moments]:
    targets = WeightGaussian(adjustment).targets(network.eval(), size, Probe())
    return {name: target.moments for name, target in targets.items()}


def agree(seen: Moments, expected: Normal) -> None:
    torch.testing.assert_close(seen.mean, torch.tensor(expected[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.var, torch.tensor(expected[1]), rtol=1e-4, atol=1e-5)


class Fire(nn.Module):
    """SqueezeNet's module behind a stem and before another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2)
        self.squeeze = nn.Conv2d(4, 2, 1)
        self.expand1x1 = nn.Conv2d(2, 3, 1)
        self.expand3x3 = nn.Conv2d(2, 2, 3, padding=1)
        self.last = nn.Conv2d(5, 5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(F.max_pool2d(F.relu(self.stem(x)), 2)))
        x = torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)
        return self.last(x).mean((2, 3))


def test_both_expansions_of_a_fire_module_follow_its_squeeze_and_are_concatenated() -> None:
    torch.manual_seed(0)
    network = Fire()
    squeeze = behind(network.squeeze, behind(network.stem, IMAGE))
    narrow, wide = behind(network.expand1x1, squeeze), behind(network.expand3x3, squeeze)
    seen = found(network)
    agree(seen["squeeze"], squeeze)
    agree(seen["expand1x1"], narrow)
    agree(seen["expand3x3"], wide)
    agree(seen["last"], behind(network.last, (narrow[0] + wide[0], narrow[1] + wide[1])))


class Residual(nn.Module):
    """A block with a convolution on its shortcut, as ResNet-18 has, and a layer behind it."""

    def __init__(self, shortcut_first: bool) -> None:
        super().__init__()
        self.shortcut_first = shortcut_first
        self.stem = nn.Conv2d(2, 3, 1)
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.downsample = nn.Conv2d(3, 4, 1, stride=2)
        self.after = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if self.shortcut_first:
            x = self.downsample(x) + self.conv2(F.relu(self.conv1(x)))
        else:
            x = self.conv2(F.relu(self.conv1(x))) + self.downsample(x)
        return self.after(F.relu(x)).flatten(1)


@pytest.mark.parametrize("shortcut_first", [False, True])
def test_a_shortcut_follows_what_feeds_its_block_and_the_trunk_goes_on(shortcut_first: bool) -> None:
    torch.manual_seed(1)
    network = Residual(shortcut_first)
    stem = behind(network.stem, IMAGE)
    trunk = behind(network.conv2, behind(network.conv1, stem))
    seen = found(network)
    agree(seen["downsample"], behind(network.downsample, stem))
    agree(seen["conv2"], trunk)
    agree(seen["after"], behind(network.after, trunk))


def test_resnet18_s_shortcuts_follow_the_stage_before() -> None:
    torch.manual_seed(2)
    network = fold(torchvision.models.resnet18(weights=None, num_classes=2), torch.zeros(1, 3, 32, 32)).graph_module
    seen = found(network, "mean", (3, 32, 32))
    before = Moments(*(t.double() for t in seen["layer1.1.conv2"]))
    inherited: Normal = (before.mean.tolist(), before.var.tolist())
    for name in ("layer2.0.conv1", "layer2.0.downsample.0"):
        agree(seen[name], behind(network.get_submodule(name), inherited))


class Gated(nn.Module):
    """A gate made of the trunk itself, with more layers on its way; both orders of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 1)
        self.down, self.up = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.after = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = gate * x
        x = x * torch.sigmoid(x)
        return self.after(self.scale * x).flatten(1)


def test_gates_and_scales_are_passed_by() -> None:
    torch.manual_seed(3)
    network = Gated()
    stem = behind(network.stem, IMAGE)
    seen = found(network)
    agree(seen["after"], behind(network.after, stem))
    agree(seen["up"], behind(network.up, behind(network.down, stem)))


class Shuffled(nn.Module):
    """Halves of the channels, of which one is convolved, and a shuffle (ShuffleNet V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.after = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, x = self.stem(x).chunk(2, 1)
        x = torch.cat([kept, self.branch(x)], 1)
        x = x.view(-1, 2, 2, 8, 8).transpose(1, 2).flatten(1, 2)
        return self.after(x).flatten(1)


def test_channels_that_are_split_and_shuffled_keep_their_own_numbers() -> None:
    torch.manual_seed(4)
    network = Shuffled()
    means, variances = behind(network.stem, IMAGE)
    branch = behind(network.branch, (means[2:], variances[2:]))
    pairs = [(kept[:2], own) for kept, own in zip((means, variances), branch, strict=True)]
    shuffled = [[kept[0], own[0], kept[1], own[1]] for kept, own in pairs]
    agree(found(network)["after"], behind(network.after, (shuffled[0], shuffled[1])))


class Untraceable(nn.Module):
    """Asks for a value, which a graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if float(x.detach().sum()) > -1e9 else x


@pytest.mark.parametrize("whole", [False, True])
def test_a_part_that_cannot_be_traced_is_a_chain(whole: bool) -> None:
    torch.manual_seed(5)
    part = Untraceable()
    network = part if whole else nn.Sequential(nn.Conv2d(3, 3, 1), part, nn.ReLU(), nn.Conv2d(3, 3, 1))
    seen = found(network, size=(3, 8, 8))
    before: Normal = ([0.0] * 3, [1.0] * 3)
    for name in seen:
        before = behind(network.get_submodule(name), before)
        agree(seen[name], before)
    assert list(seen) == (["a", "b"] if whole else ["0", "1.a", "1.b", "3"])


def test_a_linear_layer_between_convolutions_counts_too() -> None:
    torch.manual_seed(6)
    linear, after = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)
    stem = nn.Conv2d(2, 4, 8)
    network = nn.Sequential(stem, nn.Flatten(), linear, nn.Unflatten(1, (4, 1, 1)), after, nn.Flatten())
    agree(found(network)["4"], behind(after, behind(linear, behind(stem, IMAGE))))


def test_shortcuts_without_weights_leave_a_residual_network_a_chain() -> None:
    torch.manual_seed(0)
    network = settle(CifarResNet(20), (3, 16, 16))
    folded = fold(network, torch.zeros(1, 3, 16, 16)).graph_module
    seen = found(folded, size=(3, 16, 16))
    before: Normal = ([0.0] * 3, [1.0] * 3)
    for name in seen:
        before = behind(folded.get_submodule(name), before)
        agree(seen[name], before)
    assert len(seen) == 19


def test_all_channels_alike_count_as_many() -> None:
    """Equal numbers must not shrink to one channel, whose mean and least value would be added up again."""
    layers = [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]
    with torch.no_grad():
        for layer, value in zip(layers, (1.0, 2.0, 4.0), strict=True):
            layer.weight.fill_(value)
            layer.bias.zero_()  # type: ignore[union-attr]
    network = nn.Sequential(layers[0], nn.Flatten(1), nn.Unflatten(1, (4, 8, 8)), *layers[1:], nn.Flatten())
    seen = found(network, "mean_plus_min")
    means = [float(moments.mean[0]) for moments in seen.values()]
    assert [b - a for a, b in pairwise([0.0, *means])] == pytest.approx([1, 2, 4])
