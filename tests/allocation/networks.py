"""Small networks with every kind of tie, and their students."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from quantizers.calibrate import calibrate_ranges
from quantizers.convert import BitWidths, Conversion, convert
from quantizers.layer import quantizers_of
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax

CONF = Path(__file__).parents[2] / "conf"
PLAIN = Protocol(name="plain", placement="block_output")


def protocol(name: str) -> Protocol:
    return instantiate(OmegaConf.load(CONF / "protocol" / f"{name}.yaml"))


class Tied(nn.Module):
    """A shortcut with a convolution, a concatenation of two branches, a depthwise layer, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.short = nn.Conv2d(8, 12, 1, stride=2)
        self.left, self.right = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.short(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = torch.relu(self.depthwise(x))
        return self.fc(x.mean((2, 3)))


def images(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied().eval()


def student(
    network: nn.Module | None = None, *, protocol: Protocol = PLAIN, bits: tuple[int, int] = (4, 4), **options: Any
) -> Conversion:
    """Rounded to nearest, calibrated on `images()`."""
    parts = (partial(Nearest, range=MinMax()), partial(NearestActivation, range=MinMax()), BitWidths(*bits))
    found = convert(network or tied(), images(1), protocol, *parts, **options)
    calibrate_ranges(found.student, images(), 5)
    for _, quantizer in quantizers_of(found.student):
        quantizer.harden()
    return found
