"""Small networks with lively BatchNorm statistics, and their students, for the tests of corrections."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corrections.base import Calibration
from corrections.layers import add_missing_biases
from quantizers.calibrate import calibrate_ranges
from quantizers.convert import Conversion, convert
from quantizers.layer import quantizers_of
from quantizers.nearest import Nearest, NearestActivation
from quantizers.placement import BitWidths
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax
from synthesis.analytic_ranges import reference_moments

PLAIN = Protocol(name="plain", placement="block_output")


def images(count: int = 12, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Channels of very different size, and BatchNorm with the statistics of normal images."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            spread = torch.empty(len(module.weight)).log_normal_(0, 0.7, generator=generator)
            module.weight.mul_(spread.view(-1, *(1,) * (module.weight.dim() - 1)))
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(-1.5, 1.5, generator=generator)
            module.bias.normal_(generator=generator)
            module.momentum = None  # an exact average
            module.reset_running_stats()
    network.train()
    network(images(64, seed=1))
    return network.eval()


def chain(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Plain, grouped and depthwise convolutions, a pooling, a classifier."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), activation()),
        *(nn.Conv2d(8, 12, 1, groups=2, bias=False), nn.BatchNorm2d(12), activation()),
        *(nn.AvgPool2d(2), nn.Conv2d(12, 6, 3), nn.BatchNorm2d(6), activation()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    ]
    return lively(nn.Sequential(*layers))


class Residual(nn.Module):
    """A stem, a residual block, a classifier without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(y)) + x)
        return self.fc(x.mean((2, 3)))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return lively(Residual())


def student_of(network: nn.Module, *, bits: tuple[int, int] = (3, 4), weight: Any = None, **options: Any) -> Conversion:
    """A student with missing biases added, calibrated and hardened."""
    make = weight or partial(Nearest, range=MinMax())
    activation = partial(NearestActivation, range=MinMax())
    options.setdefault("prepare", add_missing_biases)
    found = convert(network, images(1), PLAIN, make, activation, BitWidths(*bits), **options)
    calibrate_ranges(found.student, images(), 5)
    for _, quantizer in quantizers_of(found.student):
        quantizer.harden()
    return found


def calibration(conversion: Conversion, count: int = 12) -> Calibration:
    """On images, in batches of which the last is smaller."""

    def means() -> dict[str, Tensor]:
        return {name: moments.mean for name, moments in reference_moments(conversion, skip_unknown=True).items()}

    return Calibration(conversion, images(count), 5, means)


@torch.no_grad()
def outputs_of(graph: nn.Module, path: str, batch: Tensor) -> Tensor:
    """The outputs (C, observations) of a convolution or linear layer, by a hook of its own."""
    seen: list[Tensor] = []
    handle = graph.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output))
    graph(batch)
    handle.remove()
    return seen[0].transpose(0, 1).flatten(1)
