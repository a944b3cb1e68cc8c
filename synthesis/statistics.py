"""The moments at each layer of a network, read with hooks that live as long as a `with`.

They are read at the input of BatchNorm layers, or at the output of convolutions where a network has no BatchNorm.
Layers are paired with their names by module identity, never by counting: registration order and execution order differ
in many networks.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from synthesis.moments import Moments, Probe, merge

Site = Literal["bn_input", "conv_output"]
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
            "the network was probably built without them or they are folded into the convolutions. Choose a target "
            "source that needs no BatchNorm (generator=propagated or generator=gzsq), calibrate on real images or on "
            "noise instead (calibration=real, calibration=noise), or on none (calibration=none reconstruction=none); "
            "fine-tuning needs no statistics where it has real images alone (calibration=real distillation=images)"
        )
    return found


def layers_at(network: nn.Module, site: Site) -> dict[str, nn.Module]:
    """Return the layers whose moments are read at `site`, by module path.

    Raises:
        ValueError: if there are none, or the site is unknown.
    """
    if site == "bn_input":
        return batch_norms(network)
    if site != "conv_output":
        raise ValueError(f"site: expected 'bn_input' or 'conv_output', got {site!r}")
    found: dict[str, nn.Module] = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    if not found:
        raise ValueError(
            f"network: expected convolutions, got none in {type(network).__name__}; the statistics of feature maps "
            "that this target source describes do not exist in it. Calibrate on real images or on noise instead"
        )
    return found


class LayerStatistics:
    """Context manager that yields the moments at every layer of a site, in order of execution.

    `with LayerStatistics(network, probe) as seen: network(images)` fills `seen[layer]` with (N, C) or (C,) moments.
    A layer that runs more than once has its observations merged, as its running statistics have.

    Raises:
        ValueError: if the network has no such layers.
    """

    def __init__(self, network: nn.Module, probe: Probe, site: Site = "bn_input") -> None:
        self.names = {module: name for name, module in layers_at(network, site).items()}
        self.probe = probe
        self.site = site
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, Moments] = {}
        self._counts: dict[str, int] = {}

    def __enter__(self) -> dict[str, Moments]:
        self._seen, self._counts = {}, {}
        for module in self.names:
            if self.site == "bn_input":
                self._handles.append(module.register_forward_pre_hook(self._read_input))
            else:
                self._handles.append(module.register_forward_hook(self._read_output))
        return self._seen

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _read_input(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._read(self.names[module], arguments[0])

    def _read_output(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        self._read(self.names[module], output)

    def _read(self, name: str, x: Tensor) -> None:
        earlier = (self._seen[name], self._counts[name]) if name in self._seen else None
        self._seen[name], self._counts[name] = observed(self.probe, x, earlier)


def observed(probe: Probe, x: Tensor, earlier: tuple[Moments, int] | None) -> tuple[Moments, int]:
    """Return the moments of `x` and the positions they stand for, merged with what the same layer saw before."""
    seen, count = probe.measure(x), x[0, 0].numel()
    if earlier is None:
        return seen, count
    return merge([earlier[0], seen], [earlier[1], count]), earlier[1] + count


def device_of(network: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer; the CPU for a network without any."""
    tensor = next(network.parameters(), next(network.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def execution_order(network: nn.Module, input_size: tuple[int, int, int], site: Site = "bn_input") -> dict[str, int]:
    """Return the channels of each layer of `site` that one forward pass executes, in that order.

    Raises:
        ValueError: if the network has no such layers, or executes none.
    """
    with torch.no_grad(), LayerStatistics(network, Probe(), site) as seen:
        network(torch.zeros(1, *input_size, device=device_of(network)))
    if not seen:
        raise ValueError(f"network: expected its forward pass to execute a layer of site {site!r}, got none")
    return {name: len(part.mean) for name, part in seen.items()}
