"""What a choice of widths costs: weight bytes, bit operations, energy, latency, and memory of activations.

Bit operations are multiplications times both widths (van Baalen et al., arXiv 2005.07093); energy follows the table of
Horowitz, "Computing's energy problem", ISSCC 2014 (45 nm), unless a table of the user's says otherwise.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allocation.groups import Choice, Group
from allocation.hardware import Pair
from allocation.resources import Resource, additive
from quantizers.layer import TRANSPOSED, QuantizedLayer, quantized_layers, sites
from quantizers.protocol import FLOAT

MULTIPLY_8 = 0.2  # pJ, 8 by 8 bits; in proportion to both widths
ADD_32 = 0.1  # pJ, into a 32-bit accumulator
MULTIPLY_ADD_FLOAT = 4.6  # pJ, float32
Choices = Sequence[Sequence[Choice]]


def sum_over_layers(groups: Sequence[Group], choices: Choices, cost: Callable[[str, Pair], float]) -> Resource:
    """The resource that costs `cost(layer, (weight bits, activation bits))` for every layer."""
    return additive(
        [
            [sum(cost(layer, pair) for layer, pair in zip(group.layers, choice.layers, strict=True)) for choice in own]
            for group, own in zip(groups, choices, strict=True)
        ]
    )


def size(groups: Sequence[Group], choices: Choices, student: nn.Module) -> Resource:
    """Bytes of all weights, their scales and zero points, as a fraction of the bytes of the float32 weights."""
    stored = {layer: _Stored(student.get_submodule(layer)) for group in groups for layer in group.layers}
    whole = 4 * sum(weight.elements for weight in stored.values())
    return sum_over_layers(groups, choices, lambda layer, pair: stored[layer].bytes(pair[0]) / whole)


def average_bits(groups: Sequence[Group], choices: Choices, student: nn.Module) -> Resource:
    """Mean width of the weights (and their zero points) that have a choice; those that the protocol fixes do not count.

    With a budget of b a network is exactly as large as the one with b bits everywhere.
    """
    free: dict[str, int] = {}
    for group, own in zip(groups, choices, strict=True):
        for i, layer in enumerate(group.layers):
            if len({choice.layers[i][0] for choice in own}) > 1:
                free[layer] = _Stored(student.get_submodule(layer)).of_varying_width
    whole = sum(free.values()) or 1
    return sum_over_layers(groups, choices, lambda layer, pair: free.get(layer, 0) * pair[0] / whole)


def summary(student: nn.Module) -> dict[str, float | None]:
    """Mean widths of a student's weights (by element) and quantized tensors, and its `size`; None where none is."""
    layers = [layer for _, layer in quantized_layers(student)]
    stored = [(_Stored(layer), layer.weight_quantizer.grid.bits) for layer in layers]
    widths = [site.quantizer.grid.bits for _, site in sites(student) if site.enabled]
    elements = sum(weight.elements for weight, _ in stored)
    return {
        "average_weight_bits": sum(w.elements * bits for w, bits in stored) / elements if stored else None,
        "average_activation_bits": sum(widths) / len(widths) if widths else None,
        "size_fraction": sum(w.bytes(bits) for w, bits in stored) / (4 * elements) if stored else None,
    }


class _Stored:
    """What is stored of one layer's weight."""

    def __init__(self, module: nn.Module) -> None:
        self.quantizer = module.weight_quantizer if isinstance(module, QuantizedLayer) else None
        layer: Any = module[1] if isinstance(module, nn.Sequential) else module
        self.elements = int(layer.weight.numel())
        self.scales = 0 if self.quantizer is None else self.quantizer.scale.numel()
        self.zero_points = 0 if self.quantizer is None or self.quantizer.grid.symmetric else self.scales

    @property
    def of_varying_width(self) -> int:
        return self.elements + self.zero_points

    def bytes(self, bits: int) -> float:
        if bits == FLOAT:
            return 4.0 * self.elements
        return (self.of_varying_width * bits + 32 * self.scales) / 8


@torch.no_grad()
def macs_of(reference: nn.Module, groups: Sequence[Group], example: Tensor) -> dict[str, int]:
    """Multiplications an image in every layer; a layer that is called twice counts twice."""
    found = {layer: 0 for group in groups for layer in group.layers}
    handles = [reference.get_submodule(layer).register_forward_hook(_count(found, layer)) for layer in found]
    try:
        device = next((t.device for t in (*reference.parameters(), *reference.buffers())), example.device)
        reference(example.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {layer: count // len(example) for layer, count in found.items()}


def _count(found: dict[str, int], path: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        positions = inputs[0] if isinstance(layer, TRANSPOSED) else output
        found[path] += positions.numel() * layer.weight[0].numel()

    return hook


def bitops(groups: Sequence[Group], choices: Choices, macs: Mapping[str, int]) -> Resource:
    """Billions of bit operations an image: multiplications times weight bits times activation bits (32 if float)."""
    return sum_over_layers(groups, choices, lambda layer, pair: macs[layer] * pair[0] * pair[1] / 1e9)


def energy(
    groups: Sequence[Group], choices: Choices, macs: Mapping[str, int], table: str | Path | None = None
) -> Resource:
    """Microjoules an image of all multiplications and additions.

    Args:
        groups: of the network.
        choices: of each group.
        macs: multiplications of each layer.
        table: csv or json with `weight`, `activation` (bits) and `picojoules` a multiplication and addition; None:
            Horowitz's.

    Raises:
        ValueError: if the table cannot be read or lacks a pair.
    """
    rows = None if table is None else {(r["weight"], r["activation"]): r["picojoules"] for r in read_table(table)}

    def cost(layer: str, pair: Pair) -> float:
        if rows is not None and pair not in rows:
            raise ValueError(
                f"allocation.energy_table: expected a row for weight, activation = {pair}, none in {table}"
            )
        return macs[layer] * (_picojoules(pair) if rows is None else rows[pair]) / 1e6

    return sum_over_layers(groups, choices, cost)


def _picojoules(pair: Pair) -> float:
    return MULTIPLY_ADD_FLOAT if FLOAT in pair else MULTIPLY_8 * pair[0] * pair[1] / 64 + ADD_32


def latency(groups: Sequence[Group], choices: Choices, table: str | Path) -> Resource:
    """Milliseconds an image, the sum over layers.

    Args:
        groups: of the network.
        choices: of each group.
        table: csv or json with `layer`, `weight`, `activation` (bits) and `milliseconds`.

    Raises:
        ValueError: if the table cannot be read or lacks a layer's pair.
    """
    rows = {(r["layer"], r["weight"], r["activation"]): r["milliseconds"] for r in read_table(table)}

    def cost(layer: str, pair: Pair) -> float:
        if (layer, *pair) not in rows:
            raise ValueError(
                f"allocation.latency_table: expected a row for layer {layer}, weight, activation = {pair}, "
                f"none in {table}; an input that stays float has 32 bits"
            )
        return rows[(layer, *pair)]

    return sum_over_layers(groups, choices, cost)


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a csv with a header, or of a json list of objects; numbers as numbers, bits as integers.

    Raises:
        ValueError: if the file is missing, of another kind, or a cell is empty or no number.
    """
    path = Path(path)
    if not path.exists() or path.suffix not in (".csv", ".json"):
        raise ValueError(f"allocation: expected a table in a csv or json file, got {path}")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else json.load(file)
    found = []
    for row in rows:
        try:
            bits = {key: int(row[key]) for key in ("weight", "activation")}
            names = {key: str(row[key]) for key in ("layer",) if key in row}
            amounts = {key: float(value) for key, value in row.items() if key not in (*bits, *names)}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"allocation: expected weight, activation and numbers in {path}, got {row}") from error
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts.values()):
            raise ValueError(f"allocation: expected finite costs of at least 0 in {path}, got {row}")
        found.append(bits | names | amounts)
    return found
