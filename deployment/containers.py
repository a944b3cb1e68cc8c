"""Which integer type holds a grid: true 4 bits, or 8 bits for kernels that know no less.

| container | weights up to 4 bits | activations up to 4 bits | meant for |
|---|---|---|---|
| int4 | INT4, UINT4 | UINT4 | NPUs, archives: the smallest file; CPUs compute it in float |
| int2 | as int4, up to 2 bits INT2, UINT2 | UINT4 | archives, opset 25; onnxruntime computes all of it in float |
| int8 | INT8 | UINT8, then an integer Min | CPUs with integer kernels |
| auto | INT8 where input and output are quantized, else as int4 | as int8 | CPUs: as fast, and smaller |

Wider grids take 8 or 16 bits in all of them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deployment.onnx_graph import Storage
from quantizers.grid import Grid

Container = Literal["auto", "int8", "int4", "int2"]
OPSETS = {"auto": 21, "int8": 21, "int4": 21, "int2": 25}


def check_container(container: str, opset: int | None) -> int:
    """The opset to write: `opset`, or the lowest that has the container's types.

    Raises:
        ValueError: for an unknown container or an opset that lacks its types.
    """
    if container not in get_args(Container):
        raise ValueError(f"export.container: expected one of {', '.join(get_args(Container))}, got {container!r}")
    needed = OPSETS[container]
    if opset is not None and opset < needed:
        raise ValueError(f"export.opset: expected at least {needed} for container {container}, got {opset}")
    return opset or needed


class StoredWeight(NamedTuple):
    """`integers - zero_point` are the multiples of the scale; `zero_point` (C,) or (), all zero where `signed`."""

    integers: Tensor
    zero_point: Tensor
    storage: Storage


def weight_storage(q: Tensor, zero_point: Tensor, grid: Grid, container: str, *, fast: bool) -> StoredWeight:
    """How a weight (C, ...) on `grid` with integers `q` is stored; `fast`: integer kernels compute its layer.

    Kernels want signed weights around zero. Where all `q - z` of the weight fit the signed type they are stored
    instead of `q`: the same numbers, and no zero point.
    """
    bits = _width(grid.bits, 8 if container == "int8" or (container == "auto" and fast) else _least(container))
    multiples, signed = q - zero_point, Storage(bits, True)
    if int(multiples.min()) >= signed.low and int(multiples.max()) <= signed.high:
        return StoredWeight(multiples, torch.zeros_like(zero_point), signed)
    return StoredWeight(q, zero_point, Storage(bits, grid.signed))


def activation_storage(grid: Grid, container: str) -> Storage:
    """Unsigned, so that the lowest level is the type's own end and only the highest needs a clamp."""
    return Storage(_width(grid.bits, 8 if container in ("int8", "auto") else 4), False)


def _least(container: str) -> int:
    return 2 if container == "int2" else 4


def _width(bits: int, least: int) -> int:
    return next(width for width in (2, 4, 8, 16) if width >= max(bits, least))
