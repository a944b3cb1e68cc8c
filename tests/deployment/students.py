"""Small calibrated students for the tests of deployment."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quantizers.calibrate import calibrate_ranges
from quantizers.convert import BitWidths, convert
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax

BLOCK = Protocol(name="brecq", placement="block_output", first_weight=8, last_weight=8, last_input=8, image=8)
LAYER = Protocol(name="all_layers", placement="layer_input", image=8)
SIZE = (3, 8, 8)


class Net(nn.Module):
    """A stem with ReLU6, pooling, a residual block, a depthwise layer, a shortcut of zeros, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.act, self.pool = nn.ReLU6(), nn.MaxPool2d(2)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.a(x))))
        x = F.relu(self.c(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.fc(x.mean((2, 3)))


def student_of(
    network: nn.Module,
    bits: tuple[int, int] = (4, 4),
    *,
    protocol: Protocol = BLOCK,
    symmetric: bool = False,
    size: tuple[int, ...] = SIZE,
    weight: partial | None = None,
) -> fx.GraphModule:
    """A student of `network` with ranges from noise."""
    torch.manual_seed(0)
    activation = partial(NearestActivation, range=MinMax(), symmetric=symmetric)
    weight = weight or partial(Nearest, range=MinMax(), symmetric=symmetric)
    student = convert(network.eval(), torch.zeros(1, *size), protocol, weight, activation, BitWidths(*bits)).student
    calibrate_ranges(student, 2 * torch.randn(16, *size), batch_size=8)
    return student


def net(seed: int = 0) -> Net:
    """`Net` with seeded weights."""
    torch.manual_seed(seed)
    return Net()


def noise(count: int, size: tuple[int, ...] = SIZE, seed: int = 1) -> Tensor:
    """Images (count, *size) that were not calibrated on."""
    return 2 * torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))
