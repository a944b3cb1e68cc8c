"""A learnable gain for every output channel of a rounded weight: scales move, integers stay.

Ours, for the polish of a whole network; that a network's scales are worth learning against the teacher's outputs is the
idea of Wang et al., "Leveraging Inter-Layer Dependency for Post-Training Quantization" (NWQ), NeurIPS 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from corrections.layers import own_layers, scale_weights
from quantizers.base import Quantizer
from quantizers.layer import QuantizedLayer, output_first

SMALLEST_GAIN = 0.05  # a channel never changes its sign nor vanishes


class Gained(nn.Module):
    """A hardened weight quantizer with a gain for each output channel; stands in its place while gains are learned.

    The integers are looked up once, so a step costs one product where the quantizer would round all weights again.

    Args:
        quantizer: hardened, with a scale for each output channel.
        weight: what it quantizes, output channels first.
    """

    multiples: Tensor  # q - z, the shape of the weight

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.gain = nn.Parameter(torch.ones_like(quantizer.scale))  # (C, 1, ..)
        integers, _, zero_point = quantizer.integers(weight)
        self.register_buffer("multiples", (integers - zero_point).to(torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The weight at the present gains, in the dtype of `x`."""
        with torch.autocast(x.device.type, enabled=False):
            scale = self.quantizer.step() * self.gain.clamp(min=SMALLEST_GAIN)
            return (self.multiples * scale).to(x.dtype)


def attach_gains(student: fx.GraphModule) -> dict[str, Gained]:
    """Put a gain at every layer that runs once and has a scale for each output channel; by path."""
    found: dict[str, Gained] = {}
    for path in own_layers(student):
        layer = student.get_submodule(path)
        if not isinstance(layer, QuantizedLayer) or layer.weight_quantizer.channel_axis is None:
            continue
        found[path] = Gained(layer.weight_quantizer, output_first(layer.layer))
        layer.weight_quantizer = found[path]  # type: ignore[assignment]
    return found


@torch.no_grad()
def absorb_gains(student: fx.GraphModule, gains: dict[str, Gained]) -> None:
    """Multiply weights and their scales by the gains, and put the quantizers back into their places."""
    for path, gained in gains.items():
        layer = student.get_submodule(path)
        assert isinstance(layer, QuantizedLayer)
        layer.weight_quantizer = gained.quantizer
        scale_weights(layer, gained.gain.detach().clamp(min=SMALLEST_GAIN).flatten())
