"""All costs of a network; among them those that depend on its graph: activations that are alive at the same time, and
changes of width between groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor, fx

from allocation import costs
from allocation.costs import Choices
from allocation.groups import Group
from allocation.hardware import Hardware
from allocation.resources import Border, Resource, Row, Values
from quantizers.convert import SITES, Conversion
from quantizers.layer import ActivationSite

MIB = 2**20


def costs_of(
    groups: Sequence[Group],
    choices: Choices,
    conversion: Conversion,
    hardware: Hardware,
    *,
    example: Tensor,
    tables: Mapping[str, str],
) -> dict[str, Resource]:
    """Size, average bits, bit operations, energy, memory, and the latency where there is a table of it.

    Args:
        groups: of the conversion.
        choices: of each group.
        conversion: student and reference.
        hardware: what a change of widths costs.
        example: a batch (N, C, H, W) of the right shape.
        tables: files of measured costs by resource, "latency" and "energy".

    Raises:
        ValueError: if a table cannot be read or lacks a row.
    """
    macs = costs.macs_of(conversion.reference, groups, example)
    found = {
        "size": costs.size(groups, choices, conversion.student),
        "average_bits": costs.average_bits(groups, choices, conversion.student),
        "bitops": costs.bitops(groups, choices, macs),
        "energy": costs.energy(groups, choices, macs, tables.get("energy")),
        "memory": peak_memory(groups, choices, conversion.student),
    }
    if "latency" in tables:
        measured = costs.latency(groups, choices, tables["latency"])
        found["latency"] = with_borders(measured, groups, choices, conversion, hardware)
    return found


def peak_memory(groups: Sequence[Group], choices: Choices, student: fx.GraphModule) -> Resource:
    """MiB an image of the quantized tensors that are alive together, where there are most.

    Operators are taken to be fused, as deployed ones are: only tensors that are quantized are stored. One row for each
    set of tensors that no other contains.
    """
    nodes = list(student.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    spans = {n: (place[n], max((place[user] for user in n.users), default=place[n])) for n in nodes if _is_site(n)}
    sets = {frozenset(n for n, (start, end) in spans.items() if start <= time <= end) for time in range(len(nodes))}
    largest = [alive for alive in sets if alive and not any(alive < other for other in sets)]
    order = {node: i for i, node in enumerate(spans)}
    rows = [_row(sorted(alive, key=order.__getitem__), groups, choices, student) for alive in largest]
    return Resource(rows=tuple(sorted(rows, key=lambda row: -sum(values.max() for values in row))))


def _row(alive: list[fx.Node], groups: Sequence[Group], choices: Choices, student: fx.GraphModule) -> Row:
    elements = {str(node.target): _elements(node) for node in alive}
    row: list[Values] = []
    decided = {site for group in groups for site in group.sites}
    rest = 0.0
    for path, count in elements.items():
        site = student.get_submodule(path)
        assert isinstance(site, ActivationSite)
        rest += 0 if path in decided else count * site.quantizer.grid.bits
    for group, own in zip(groups, choices, strict=True):
        bits = [sum(elements.get(p, 0) * b for p, b in zip(group.sites, c.sites, strict=True)) for c in own]
        row.append((np.array(bits, dtype=np.float64) + rest) / 8 / MIB)
        rest = 0.0  # tensors that no group decides about count once
    return tuple(row)


def with_borders(
    resource: Resource, groups: Sequence[Group], choices: Choices, conversion: Conversion, hardware: Hardware
) -> Resource:
    """The latency, and what the hardware takes to change the width of tensors between groups."""
    if not hardware.conversion:
        return resource
    owner = {site: g for g, group in enumerate(groups) for site in group.sites}
    makers = {node: g for g, group in enumerate(groups) for node in group.nodes}
    due: dict[tuple[int, int], float] = {}
    for node in conversion.student.graph.nodes:
        if _is_site(node) and str(node.target) in owner:
            behind = owner[str(node.target)]
            for before in {makers[n.name] for n in _makers(node, makers)} - {behind}:
                cost = hardware.conversion * _elements(node) / 1e6
                due[before, behind] = due.get((before, behind), 0.0) + cost
    borders = tuple(Border(before, behind, cost) for (before, behind), cost in due.items())
    widths = tuple(tuple(choice.pair[1] for choice in own) for own in choices)
    return Resource(rows=resource.rows, borders=borders, widths=widths)


def _makers(site: fx.Node, known: dict[str, int]) -> list[fx.Node]:
    """The nearest nodes of groups that a tensor is made of: layers, or tensors that are quantized before."""
    found, seen, left = [], {site}, [site]
    while left:
        for source in left.pop().all_input_nodes:
            if source.name in known:
                found.append(source)
            elif source not in seen:
                seen.add(source)
                left.append(source)
    return found


def _is_site(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).startswith(f"{SITES}.")


def _elements(node: fx.Node) -> float:
    shape = node.meta["shape"]  # of the example
    return math.prod(shape) / shape[0]
