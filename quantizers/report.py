"""What was quantized, one row a quantizer, and how many bytes it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from quantizers.base import Quantizer
from quantizers.layer import ActivationSite, QuantizedLayer


@dataclass(frozen=True, kw_only=True)
class QuantizerRow:
    """One quantizer. `signed`: whether the tensor can be negative (the grid may use unsigned integers all the same).
    `name`: path of the layer for a weight, name of the graph node for an activation (path of the
    layer where the tensor has no node). `scope`: path of the module that the layer or tensor belongs to.
    """

    name: str
    kind: Literal["weight", "activation"]
    bits: int
    signed: bool
    symmetric: bool
    per_channel: bool
    method: str
    scope: str


def rows(student: fx.GraphModule) -> list[QuantizerRow]:
    """A row for every quantizer of a student, in order of execution; a shared layer has one row."""
    found: list[QuantizerRow] = []
    seen: set[int] = set()
    for node in student.graph.nodes:
        if node.op != "call_module":
            continue
        for name, module in student.get_submodule(str(node.target)).named_modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            path = ".".join(filter(None, (str(node.target), name)))
            if isinstance(module, QuantizedLayer):
                found.append(_row(path, "weight", module.weight_quantizer, True, path))
            elif isinstance(module, ActivationSite):
                tensor, signed = node.meta.get("tensor", path), node.meta.get("signed", True)
                found.append(_row(tensor, "activation", module.quantizer, signed, node.meta["scope"]))
    return found


def _row(
    name: str, kind: Literal["weight", "activation"], quantizer: Quantizer, signed: bool, scope: str
) -> QuantizerRow:
    grid = quantizer.grid
    return QuantizerRow(
        name=name,
        kind=kind,
        bits=grid.bits,
        signed=signed,
        symmetric=grid.symmetric,
        per_channel=quantizer.scale.numel() > 1,
        method=type(quantizer).__name__,
        scope=scope,
    )


def weight_bytes(student: nn.Module) -> tuple[int, int]:
    """(bytes in float32, bytes quantized) of everything the student stores to run.

    Quantized weights count with their bits, packed without gaps; each weight scale 4 bytes, each weight zero point its
    bits (none for a symmetric grid); each activation site 4 bytes and its bits likewise. All other parameters and
    buffers (biases, normalisations, layers left in float) count 4 bytes an element on both sides.
    """
    weights = {id(m.layer.weight): m for m in student.modules() if isinstance(m, QuantizedLayer)}
    quantizers = {id(q): q for q in student.modules() if isinstance(q, Quantizer)}
    internal = {id(t) for q in quantizers.values() for t in (*q.parameters(), *q.buffers())}
    stored = {id(t): t for t in (*student.parameters(), *student.buffers()) if id(t) not in internal}
    elements = sum(t.numel() for t in stored.values())
    bits = 32 * sum(t.numel() for key, t in stored.items() if key not in weights)
    bits += sum(stored[key].numel() * m.weight_quantizer.grid.bits for key, m in weights.items())
    for q in quantizers.values():
        bits += q.scale.numel() * (32 + (0 if q.grid.symmetric else q.grid.bits))
    return 4 * elements, math.ceil(bits / 8)
