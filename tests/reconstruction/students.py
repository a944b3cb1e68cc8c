"""Small networks and their quantized copies for the tests of reconstruction."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from networks.cifar_resnet import CifarResNet
from quantizers.adaround import AdaRound
from quantizers.calibrate import calibrate_ranges
from quantizers.convert import Conversion, convert
from quantizers.layer import quantizers_of
from quantizers.lsq import LSQ
from quantizers.placement import BitWidths
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax
from reconstruction.activations import ActivationCache
from reconstruction.partition import partition

QDROP = Protocol(name="qdrop", placement="block_output", first_weight=8, last_weight=8, last_input=8)


def images(count: int, size: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def resnet8(seed: int = 0) -> nn.Module:
    """Random weights, and BatchNorm statistics that differ between channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = CifarResNet(8, in_channels=1)
        network.train()
        for _ in range(3):
            network(torch.randn(32, 1, 8, 8))
    return network.eval()


def student_of(
    network: nn.Module,
    calibration: Tensor,
    *,
    bits: tuple[int, int] = (2, 4),
    weight: Any = None,
    activation: Any = None,
) -> Conversion:
    """A calibrated conversion with AdaRound and LSQ at rates that move something within a few steps."""
    conversion = convert(
        network,
        torch.zeros_like(calibration[:1]),
        QDROP,
        weight or partial(AdaRound, range=MinMax(), lr=0.05),
        activation or partial(LSQ, range=MinMax(), lr=1e-3),
        BitWidths(*bits),
    )
    calibrate_ranges(conversion.student, calibration, 16)
    return conversion


class Skip(nn.Module):
    """Three layers, the second with a skip connection around it: more than its output is alive behind it."""

    def __init__(self, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        return self.third(self.second(a).relu() + a)


def vectors(count: int, size: int = 6) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1))


def skip_at(
    index: int, *, network: nn.Module | None = None, count: int = 10, bits: tuple[int, int] = (2, 4), **arguments: Any
) -> tuple[Conversion, ActivationCache]:
    """The student of `Skip`, rounded to the nearest, and a cache that has entered one of its layers."""
    x = vectors(count)
    conversion = student_of(network or Skip().eval(), x, bits=bits)
    for _, quantizer in quantizers_of(conversion.student):
        quantizer.harden()
    units = partition(conversion.reference, "layer")
    arguments = {"batch_size": 4} | arguments
    cache = ActivationCache(conversion.reference, conversion.student, units=units, images=x, **arguments)
    cache.enter(index)
    return conversion, cache
