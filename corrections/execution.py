"""Runs a network over all calibration images, whole or stopping at every layer that is to be corrected.

A correction that goes from layer to layer must see what earlier corrections changed. Running the network anew for each
layer would cost L forwards; here all batches advance together from layer to layer, which costs two. What later nodes
read is kept in main memory: at most the largest few feature maps of all images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from corrections.layers import channels_first, float_layer

Values = dict[fx.Node, Any]


class PooledMoments:
    """Mean and biased variance per channel over all batches, each observation counted once, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())  # sum of squared deviations

    def update(self, rows: Tensor) -> None:
        """Add observations (C, n); merged as Chan, Golub, LeVeque (1979), which does not cancel."""
        rows = rows.double()
        mean, count = rows.mean(1), rows.shape[1]
        squares = (rows - mean[:, None]).square().sum(1)
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        """(C,), never negative."""
        return self.squares / self.count


class Stop(NamedTuple):
    """A layer whose inputs are final. `moments` measures its outputs as the layer stands now."""

    path: str
    module: nn.Module
    moments: Callable[[], PooledMoments]


class _Walk:
    """All batches on their way through a graph; `caches` holds, for each, what nodes further on read."""

    def __init__(self, network: fx.GraphModule, images: Tensor, batch_size: int) -> None:
        self.network = network
        self.nodes = [node for node in network.graph.nodes if node.op != "output"]
        self.position = {node: i for i, node in enumerate(self.nodes)}
        behind = {node: [self.position.get(user, -1) for user in node.users] for node in self.nodes}
        self.last = {node: max(users, default=-1) for node, users in behind.items()}
        self.device = device_of(network)
        self.interpreter = fx.Interpreter(network, garbage_collect_values=False)
        first = next(node for node in self.nodes if node.op == "placeholder")
        self.caches: list[Values] = [{first: batch} for batch in batches(images, batch_size)]
        self.done = 0

    @torch.no_grad()
    def advance(self, stop: int) -> None:
        """Run all batches up to the node with number `stop`, which itself does not run yet."""
        nodes = [node for node in self.nodes[self.done : stop] if node.op != "placeholder"]
        read = {source for node in nodes for source in node.all_input_nodes}
        with evaluating(self.network):
            for k in range(len(self.caches)):
                cache = self.caches[k]
                kept = {node: value for node, value in cache.items() if self.last[node] >= stop}
                self.caches[k] = kept
                values = {node: _to(value, self.device) for node, value in cache.items() if node in read}
                del cache
                self.interpreter.env = values
                for node in nodes:
                    values[node] = self.interpreter.run_node(node)
                    for spent in {node, *node.all_input_nodes}:
                        if self.last[spent] <= self.position[node]:  # or a long way to a stop holds every feature map
                            del values[spent]
                kept |= {node: _to(values[node], torch.device("cpu")) for node in nodes if self.last[node] >= stop}
                values.clear()  # on a device, or they stay there beside the next batch's
        self.done = stop

    @torch.no_grad()
    def moments(self, node: fx.Node) -> PooledMoments:
        """Moments of the outputs of a layer whose inputs are there."""
        found, layer = PooledMoments(), float_layer(self.network.get_submodule(str(node.target)))
        with evaluating(self.network):
            for cache in self.caches:
                self.interpreter.env = {source: _to(cache[source], self.device) for source in node.all_input_nodes}
                found.update(channels_first(layer, self.interpreter.run_node(node)))
        self.interpreter.env = {}
        return found


def walk(network: fx.GraphModule, layers: Collection[str], images: Tensor, batch_size: int) -> Iterator[Stop]:
    """Stops at each of `layers` (paths of modules that run once), in order of execution.

    Args:
        network: runs in evaluation mode.
        layers: where to stop; each may be changed in place while stopped, and later stops see the change.
        images: (N, C, H, W), moved to the network's device batch by batch.
        batch_size: images at a time.
    """
    way = _Walk(network, images, batch_size)
    for number, node in enumerate(way.nodes):
        if node.op == "call_module" and node.target in layers:
            way.advance(number)
            yield Stop(str(node.target), network.get_submodule(str(node.target)), partial(way.moments, node))


def output_moments(
    network: fx.GraphModule, layers: Collection[str], images: Tensor, batch_size: int
) -> dict[str, PooledMoments]:
    """Moments of the outputs of `layers` by path, in one pass over all images."""
    found = {path: PooledMoments() for path in layers}
    handles = []
    for path in layers:
        module = network.get_submodule(path)

        def watch(module: nn.Module, inputs: Any, output: Tensor, path: str = path) -> None:
            found[path].update(channels_first(float_layer(module), output))

        handles.append(module.register_forward_hook(watch))
    device = device_of(network)
    try:
        with torch.no_grad(), evaluating(network):
            for batch in batches(images, batch_size):
                network(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def batches(images: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """The images in batches, the last one possibly smaller."""
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images: expected a non-empty batch (N, C, H, W), got shape {tuple(images.shape)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}. Try 32.")
    return images.split(batch_size)


def device_of(network: nn.Module) -> torch.device:
    """Where the parameters are; the CPU for a network without any."""
    return next((t.device for t in (*network.parameters(), *network.buffers())), torch.device("cpu"))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module gets its own mode back."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _to(value: Any, device: torch.device) -> Any:
    return map_aggregate(value, lambda part: part.to(device) if isinstance(part, Tensor) else part)  # type: ignore[arg-type]
