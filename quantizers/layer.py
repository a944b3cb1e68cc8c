"""The two modules that conversion inserts into a network: a layer with quantized weights, and a quantized tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantizers.base import Quantizer
from quantizers.qdrop import qdrop

_Module = TypeVar("_Module", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
_CONVOLVE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


class QuantizedLayer(nn.Module):
    """A convolution or linear layer that computes with quantized weights.

    `layer` keeps the float weights (frozen) and the bias; `weight_quantizer` sees the weight with its output channels
    first (`output_first`), whatever the kind of layer. `input_site` is set only for layers inside a submodule that
    could not be traced: there the input tensor has no node of its own, and the layer quantizes it itself.
    """

    def __init__(self, layer: nn.Module, weight_quantizer: Quantizer, input_site: ActivationSite | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = weight_quantizer
        self.input_site = input_site
        self.enabled = True
        layer.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The float weight, so that code which looks at `layer.weight` (its device, its shape) keeps working."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer, kept in float."""
        return self.layer.bias  # type: ignore[return-value]

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight in the layer's own layout; differentiable in the quantizer's parameters."""
        return own_layout(self.layer, self.weight_quantizer(output_first(self.layer)))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.input_site is not None:
            x = self.input_site(x)
        if not self.enabled:
            return self.layer(x, *args, **kwargs)
        return _apply(self.layer, self.quantized_weight(), x, args, kwargs)


def _apply(layer: Any, weight: Tensor, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    kind = type(layer)
    if not args and not kwargs:
        if kind is nn.Linear:
            return F.linear(x, weight, layer.bias)
        if kind in _CONVOLVE and layer.padding_mode == "zeros":
            return _CONVOLVE[kind](x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    # transposed convolutions, other paddings and subclasses: their own forward with the weight exchanged
    return torch.func.functional_call(layer, {"weight": weight}, (x, *args), kwargs)


def output_first(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight as (output channels, inputs per group, *kernel); transposed convolutions store it otherwise."""
    weight = layer.weight if weight is None else weight  # type: ignore[assignment]
    assert isinstance(weight, Tensor)
    if not isinstance(layer, TRANSPOSED):
        return weight
    inputs, outputs = weight.shape[:2]  # (in, out / groups, *kernel)
    grouped = weight.reshape(layer.groups, inputs // layer.groups, outputs, *weight.shape[2:])
    return grouped.transpose(1, 2).reshape(layer.groups * outputs, inputs // layer.groups, *weight.shape[2:])


def own_layout(layer: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `output_first`."""
    if not isinstance(layer, TRANSPOSED):
        return weight
    outputs, inputs = weight.shape[:2]
    grouped = weight.reshape(layer.groups, outputs // layer.groups, inputs, *weight.shape[2:])
    return grouped.transpose(1, 2).reshape(layer.groups * inputs, outputs // layer.groups, *weight.shape[2:])


class ActivationSite(nn.Module):
    """A tensor of the network that is quantized, once, for all who read it.

    While the module is in training mode and `drop` > 0 every element stays float with probability `drop` (QDrop,
    Wei et al., ICLR 2022, arXiv 2203.05740), drawn from `generator`; in evaluation all elements are quantized.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.enabled = True
        self.drop = 0.0
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        quantized = self.quantizer(x)
        if self.training and self.drop > 0.0:
            return qdrop(quantized, x, self.drop, self.generator)
        return quantized


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(path, layer) of every quantized layer below `module`, each once, in registration order."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, QuantizedLayer))


def sites(module: nn.Module) -> Iterator[tuple[str, ActivationSite]]:
    """(path, site) of every quantized tensor below `module`, each once, in registration order."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, ActivationSite))


def quantizers_of(module: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """(path, quantizer) of every quantizer below `module`, of weights and of activations."""
    return ((name, m) for name, m in module.named_modules() if isinstance(m, Quantizer))


@contextmanager
def float_mode(student: nn.Module) -> Iterator[None]:
    """Switches every quantizer off, so that the student computes like the teacher; restores each switch on leaving."""
    switches = [m for m in student.modules() if isinstance(m, QuantizedLayer | ActivationSite)]
    before = [m.enabled for m in switches]
    try:
        for switch in switches:
            switch.enabled = False
        yield
    finally:
        for switch, enabled in zip(switches, before, strict=True):
            switch.enabled = enabled


def hardened_copy(student: _Module) -> _Module:
    """A copy whose decisions are final as they stand: before anything is learned, every weight rounded to nearest."""
    copied = copy.deepcopy(student)
    for _, quantizer in quantizers_of(copied):
        quantizer.harden()
    return copied
