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
from quantizers.lsq import LSQ
from quantizers.placement import BitWidths
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax

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
