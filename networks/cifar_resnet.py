"""ResNets for small images: ResNet-20/32/44/56/110 with the parameter-free "option A" shortcut.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385, section 4.2.
Key names are those of the usual public checkpoints (`layer1.0.conv1`, ..., `linear`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

STAGE_WIDTHS = (16, 32, 64)


class OptionAShortcut(nn.Module):
    """Subsample by the stride and pad the missing channels with zeros, half before and half after."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C', H/stride, W/stride)
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, ReLU after the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else OptionAShortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


def blocks_per_stage(depth: int) -> int:
    """Return (depth - 2) / 6; `ValueError` if that is no positive integer."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth: expected 6n + 2 (8, 20, 32, 44, 56, 110), got {depth}")
    return (depth - 2) // 6


class CifarResNet(nn.Module):
    """Stem, three stages of `(depth - 2) / 6` blocks at 16, 32 and 64 channels, global pooling, one linear layer.

    Args:
        depth: 20, 32, 44, 56, 110, or any other 6n + 2 (8 for tests).
        num_classes: size of the output.
        in_channels: 3 for CIFAR, 1 for Fashion-MNIST.

    Raises:
        ValueError: if `depth` is not 6n + 2 with n >= 1.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_channels, STAGE_WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.relu = nn.ReLU()
        self.layer1 = self._stage(STAGE_WIDTHS[0], STAGE_WIDTHS[0], 1, blocks)
        self.layer2 = self._stage(STAGE_WIDTHS[0], STAGE_WIDTHS[1], 2, blocks)
        self.layer3 = self._stage(STAGE_WIDTHS[1], STAGE_WIDTHS[2], 2, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(STAGE_WIDTHS[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, num_classes)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))
