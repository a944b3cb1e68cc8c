"""An ONNX graph under construction: nodes, constants packed to their width, and names that are given once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deployment.packages import require


class Storage(NamedTuple):
    """The integer type that a tensor is stored in: 2, 4, 8, 16 or 32 bits."""

    bits: int
    signed: bool

    @property
    def name(self) -> str:
        """ONNX's name of the type."""
        return f"{'' if self.signed else 'U'}INT{self.bits}"

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return self.low + 2**self.bits - 1


class OnnxGraph:
    """Collects nodes in the order in which they are added; a name that is taken gets a number.

    Attributes:
        nodes: what was added.
        constants: initializers.
        weight_bytes: bytes of the initializers.
    """

    def __init__(self) -> None:
        self.helper: Any = require("onnx").helper
        self.types: Any = require("onnx").TensorProto
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.weight_bytes = 0
        self._taken: set[str] = set()

    def name(self, wanted: str) -> str:
        """`wanted`, or `wanted_2`, `wanted_3`, ... where it is taken."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name

    def add(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node with one output, which bears the node's name."""
        return self.add_several(operator, inputs, name, 1, **attributes)[0]

    def add_several(
        self, operator: str, inputs: Sequence[str], name: str, outputs: int, **attributes: Any
    ) -> list[str]:
        """A node with several outputs."""
        name = self.name(name)
        names = [name, *(self.name(f"{name}_{i}") for i in range(1, outputs))]
        self.nodes.append(self.helper.make_node(operator, list(inputs), names, name=name, **attributes))
        return names

    def unchanged(self, name: str) -> str:
        """The same floats behind a node that no runtime removes: what lies on its two sides is not joined."""
        return self.add("Min", [name, self.constant(f"{name}_largest", torch.finfo(torch.float32).max)], f"{name}_kept")

    def constant(self, name: str, values: Tensor | float | Sequence[int], storage: Storage | str | None = None) -> str:
        """An initializer; floats unless `storage` is an integer type or "INT64"."""
        values = torch.as_tensor(values).detach().cpu()
        if storage is None:
            kind, raw = "FLOAT", values.float().numpy().tobytes()
        elif storage == "INT64":
            kind, raw = "INT64", values.to(torch.int64).numpy().tobytes()
        else:
            assert isinstance(storage, Storage)
            kind, raw = storage.name, packed(values, storage)
        name = self.name(name)
        tensor = self.types(name=name, data_type=getattr(self.types, kind), dims=list(values.shape), raw_data=raw)
        self.constants.append(tensor)
        self.weight_bytes += len(raw)
        return name


def packed(values: Tensor, storage: Storage) -> bytes:
    """Integers as ONNX stores them: little endian; 4 and 2 bits several to a byte, the first in the lowest bits."""
    assert int(values.min()) >= storage.low
    assert int(values.max()) <= storage.high
    flat = values.to(torch.int64).numpy().reshape(-1)
    if storage.bits >= 8:
        return flat.astype(f"<{'i' if storage.signed else 'u'}{storage.bits // 8}").tobytes()
    each = 8 // storage.bits
    fields = np.zeros(-(-len(flat) // each) * each, dtype=np.int64)
    fields[: len(flat)] = flat & (2**storage.bits - 1)
    shifts = storage.bits * np.arange(each)
    return (fields.reshape(-1, each) << shifts).sum(1).astype(np.uint8).tobytes()
