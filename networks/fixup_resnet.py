"""ResNets for small images without any normalisation, for methods that must do without BatchNorm statistics.

Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization", ICLR 2019, arXiv 1901.09321.
Deviates: a bias for each channel, inside the convolution, where the paper has scalar biases before convolutions and
activations; and the multiplier of each branch exists in training only (`add_branch_multipliers`); its product with the
weights is what is stored. Convolution, ReLU and addition are then all that the network consists of.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from networks.cifar_resnet import STAGE_WIDTHS, OptionAShortcut, blocks_per_stage


class FixupBlock(nn.Module):
    """Two 3x3 convolutions with bias and a shortcut, ReLU after the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else OptionAShortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        out = self.conv2(self.relu1(self.conv1(x)))
        return self.relu2(out + self.shortcut(x))


class FixupResNet(nn.Module):
    """`CifarResNet` without BatchNorm, initialised by Fixup's rules 1 and 2.

    Residual branches and the classifier start at zero, and the first convolution of each branch is scaled by
    L^(-1/(2m-2)), for L branches of m = 2 layers: by L^(-1/2).

    Args:
        depth: 6n + 2.
        num_classes: size of the output.
        in_channels: 3 for CIFAR, 1 for Fashion-MNIST.

    Raises:
        ValueError: if `depth` is not 6n + 2 with n >= 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_channels, STAGE_WIDTHS[0], 3, 1, 1)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(STAGE_WIDTHS[0], STAGE_WIDTHS[0], 1, blocks)
        self.layer2 = self._stage(STAGE_WIDTHS[0], STAGE_WIDTHS[1], 2, blocks)
        self.layer3 = self._stage(STAGE_WIDTHS[1], STAGE_WIDTHS[2], 2, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(STAGE_WIDTHS[2], num_classes)
        self._initialise(branches=3 * blocks)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = FixupBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(FixupBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    @torch.no_grad()
    def _initialise(self, branches: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.kaiming_normal_(module.weight)
                module.bias.zero_()
        for module in self.modules():
            if isinstance(module, FixupBlock):
                module.conv1.weight.mul_(branches**-0.5)
                module.conv2.weight.zero_()
        self.linear.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, num_classes)
        x = self.relu(self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


class Multiplier(nn.Module):
    """A weight times one learned number that starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight


def add_branch_multipliers(network: FixupResNet) -> list[nn.Parameter]:
    """Give every residual branch its multiplier (Fixup's rule 3) for training; return them."""
    scales = []
    for module in network.modules():
        if isinstance(module, FixupBlock):
            multiplier = Multiplier()
            parametrize.register_parametrization(module.conv2, "weight", multiplier)
            scales.append(multiplier.scale)
    return scales


def fold_branch_multipliers(network: FixupResNet) -> None:
    """Multiply them into the weights and remove them: the function stays, the parameters are those of the class."""
    for module in network.modules():
        if isinstance(module, FixupBlock):
            parametrize.remove_parametrizations(module.conv2, "weight", leave_parametrized=True)
