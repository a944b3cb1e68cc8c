"""The moments that arrive at each batch-normalisation layer, read with hooks that live as long as a `with`.

The input of the layer is read, and layers are paired with their names by module identity, never by counting:
registration order and execution order differ in many networks.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from synthesis.moments import Moments, Probe, merge

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batch_norms(network: nn.Module) -> dict[str, nn.Module]:
    """Return the BatchNorm layers that hold running statistics, by module path.

    Raises:
        ValueError: if there are none.
    """
    found: dict[str, nn.Module] = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    }
    if not found:
        raise ValueError(
            f"network: expected BatchNorm layers with running statistics, got none in {type(network).__name__}; "
            "the network was probably built without them or they are folded into the convolutions. Calibrate on "
            "real images or on noise instead, or choose a target source that needs no BatchNorm"
        )
    return found


class BNStatistics:
    """Context manager that yields the moments of every BatchNorm input, in order of execution.

    `with BNStatistics(network, probe) as seen: network(images)` fills `seen[layer]` with (N, C) or (C,) moments.
    A layer that runs more than once has its observations merged, as its running statistics have.

    Raises:
        ValueError: if the network has no BatchNorm layers.
    """

    def __init__(self, network: nn.Module, probe: Probe) -> None:
        self.names = {module: name for name, module in batch_norms(network).items()}
        self.probe = probe
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Moments] = {}
        self._counts: dict[str, int] = {}

    def __enter__(self) -> dict[str, Moments]:
        self._seen, self._counts = {}, {}
        self._handles = [module.register_forward_pre_hook(self._read) for module in self.names]
        return self._seen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _read(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        name, x = self.names[module], arguments[0]
        seen, count = self.probe.measure(x), x[0, 0].numel()
        if name in self._seen:
            seen = merge([self._seen[name], seen], [self._counts[name], count])
            count += self._counts[name]
        self._seen[name], self._counts[name] = seen, count


def device_of(network: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a network without any."""
    tensor = next(network.parameters(), next(network.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def execution_order(network: nn.Module, input_size: tuple[int, int, int]) -> dict[str, int]:
    """Return the channels of each BatchNorm layer that one forward pass executes, in that order.

    Raises:
        ValueError: if the network has no BatchNorm layers, or executes none.
    """
    with torch.no_grad(), BNStatistics(network, Probe()) as seen:
        network(torch.zeros(1, *input_size, device=device_of(network)))
    if not seen:
        raise ValueError("network: expected its forward pass to execute a BatchNorm layer, got none executed")
    return {name: len(part.mean) for name, part in seen.items()}
