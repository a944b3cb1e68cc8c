"""The features that enter a network's classifier, read with a hook that lives as long as a `with`."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from synthesis.statistics import device_of


def classifier_of(network: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Return the last Linear or Conv2d that a forward pass executes.

    Raises:
        ValueError: if the network executes none.
    """
    order: list[nn.Module] = []
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(lambda module, _: order.append(module)) for layer in layers]
    try:
        with torch.no_grad():
            network(torch.zeros(1, *input_size, device=device_of(network)))
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError(
            f"network: expected a forward pass through Linear or Conv2d layers, got none in {type(network).__name__}; "
            "leave out the terms that compare features"
        )
    return order[-1]


class ClassifierInput:
    """Context manager: after a forward pass inside it, `value` holds the classifier's input, (N, F).

    A convolutional classifier's input is averaged over its positions.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.classifier = classifier_of(network, input_size)
        self.value: Tensor | None = None
        self._handle: RemovableHandle | None = None

    @property
    def width(self) -> int:
        """F."""
        layer = self.classifier
        return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[return-value, union-attr]

    def __enter__(self) -> ClassifierInput:
        self.value = None
        self._handle = self.classifier.register_forward_pre_hook(self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _read(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.value = pooled(arguments[0])


def pooled(x: Tensor) -> Tensor:
    """Return a classifier's input as (N, F): averaged over positions where there are any."""
    return x.mean((2, 3)) if x.dim() == 4 else x
