"""One student on which single groups are exchanged: quantizers are switched, nothing is converted again.

What lies before the exchanged group does not change, so the graph runs once up to it and from there for each choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from allocation.groups import Choice, Group
from quantizers.base import Quantizer
from quantizers.layer import ActivationSite, QuantizedLayer, quantized_layers, sites
from quantizers.protocol import FLOAT

Values = dict[fx.Node, Any]


class Swaps:
    """Groups of one student, each at a choice or at its base.

    Args:
        students: converted from the same network at different widths, calibrated and hardened, so that every width of
            every choice occurs in one of them. The first is the one that runs; it is changed.
        groups: of these students.
        base: what all groups are at that are not exchanged; None: float.
    """

    def __init__(
        self, students: Sequence[fx.GraphModule], groups: Sequence[Group], base: Sequence[Choice] | None = None
    ) -> None:
        self.student = students[0].eval()
        self.groups = list(groups)
        self.base = None if base is None else list(base)
        self.quantizers: dict[tuple[str, int], Quantizer | None] = {}  # by path and bits; None: no image reached it
        for student in students:
            for path, layer in quantized_layers(student):
                self.quantizers.setdefault((path, layer.weight_quantizer.grid.bits), layer.weight_quantizer)
            for path, site in sites(student):
                known = site.quantizer if site.enabled else None
                self.quantizers.setdefault((path, site.quantizer.grid.bits), known)
        self.undecided = {path: s for path, s in sites(self.student) if not any(path in g.sites for g in self.groups)}
        self.reachable = {path for path, site in self.undecided.items() if site.enabled}
        self.runner = _Runner(self.student)

    def reset(self) -> None:
        """Put every group at its base."""
        for i, group in enumerate(self.groups):
            self._put(group, None if self.base is None else self.base[i])
        self._switch_undecided(on=self.base is not None)

    def assign(self, chosen: Sequence[Choice]) -> None:
        """Put every group at a choice: the network that conversion with these bits gives, rounded to nearest."""
        for group, choice in zip(self.groups, chosen, strict=True):
            self._put(group, choice)
        self._switch_undecided(on=True)

    def _switch_undecided(self, *, on: bool) -> None:
        for path, site in self.undecided.items():
            site.enabled = on and path in self.reachable

    def _put(self, group: Group, choice: Choice | None) -> None:
        widths = [FLOAT] * len(group.layers) if choice is None else [weight for weight, _ in choice.layers]
        for path, bits in zip(group.layers, widths, strict=True):
            layer = self.student.get_submodule(path)
            if isinstance(layer, QuantizedLayer):
                layer.enabled = bits != FLOAT
                if layer.enabled:
                    layer.weight_quantizer = self._find(path, bits) or layer.weight_quantizer
        for i, path in enumerate(group.sites):
            site = self.student.get_submodule(path)
            assert isinstance(site, ActivationSite)
            quantizer = None if choice is None or choice.sites[i] == FLOAT else self._find(path, choice.sites[i])
            site.enabled = quantizer is not None
            site.quantizer = quantizer or site.quantizer

    def _find(self, path: str, bits: int) -> Quantizer | None:
        assert (path, bits) in self.quantizers, f"no student has {path} at {bits} bits"
        return self.quantizers[path, bits]

    @torch.no_grad()
    def run(self, images: Tensor, batch_size: int) -> Tensor:
        """The outputs (N, K) of the student as it stands, on the CPU."""
        device = _device(self.student)
        return torch.cat([self.student(batch.to(device)).float().cpu() for batch in images.split(batch_size)])

    @torch.no_grad()
    def outputs(self, index: int, options: Sequence[Choice], images: Tensor, batch_size: int) -> Iterator[list[Tensor]]:
        """For each batch, the outputs (B, K) with one group at each of its options and the rest at the base."""
        self.reset()
        group, device = self.groups[index], _device(self.student)
        start = self.runner.first(group.nodes)
        for batch in images.split(batch_size):
            before = self.runner.advance({}, 0, start, batch.to(device))
            found = []
            for option in options:
                self._put(group, option)
                found.append(self.runner.finish(dict(before), start))
                self._put(group, None if self.base is None else self.base[index])
            yield found

    @torch.no_grad()
    def layer_outputs(
        self, index: int, options: Sequence[Choice], images: Tensor, batch_size: int
    ) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
        """For each batch, what the group's layers give at the base, and with each option."""
        self.reset()
        group, device = self.groups[index], _device(self.student)
        start, stop = self.runner.first(group.nodes), self.runner.last(group.nodes) + 1
        seen: list[Tensor] = []
        layers = [self.student.get_submodule(path) for path in group.layers]
        handles = [layer.register_forward_hook(lambda m, i, output: seen.append(output.float())) for layer in layers]
        try:
            for batch in images.split(batch_size):
                before = self.runner.advance({}, 0, start, batch.to(device))
                found = []
                for option in (None if self.base is None else self.base[index], *options):
                    self._put(group, option)
                    seen.clear()
                    self.runner.advance(dict(before), start, stop)
                    found.append(list(seen))
                self._put(group, None if self.base is None else self.base[index])
                yield found[0], found[1:]
        finally:
            for handle in handles:
                handle.remove()


class _Runner(fx.Interpreter):
    """Runs a part of a graph from the values that are alive before it."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.nodes = list(graph_module.graph.nodes)
        place = {node: i for i, node in enumerate(self.nodes)}
        self.places = {node.name: i for node, i in place.items()}
        self.dead: list[list[fx.Node]] = [[] for _ in self.nodes]  # whose last reader a node is
        for node in self.nodes:
            self.dead[max((place[user] for user in node.users), default=place[node])].append(node)

    def first(self, names: Sequence[str]) -> int:
        return min(self.places[name] for name in names)

    def last(self, names: Sequence[str]) -> int:
        return max(self.places[name] for name in names)

    def advance(self, values: Values, start: int, stop: int, image: Tensor | None = None) -> Values:
        """Run nodes `start` up to, but not including, `stop`; `values` then holds what later ones need."""
        self.env, self.args_iter = values, iter(() if image is None else (image,))
        for i in range(start, stop):
            values[self.nodes[i]] = self.run_node(self.nodes[i])
            for node in self.dead[i]:
                if i < len(self.nodes) - 1:
                    values.pop(node, None)
        return values

    def finish(self, values: Values, start: int) -> Tensor:
        """Run to the end and return the network's output."""
        return self.advance(values, start, len(self.nodes))[self.nodes[-1]].float()


def _device(network: nn.Module) -> torch.device:
    return next((t.device for t in (*network.parameters(), *network.buffers())), torch.device("cpu"))
