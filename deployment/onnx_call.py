"""One operator of a traced network on its way to ONNX: its arguments by name, and what its tensors are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from deployment.onnx_values import Facts, Value, Values

Result = Value | list[Value]

# Names of the arguments behind the tensor, as functions and methods take them by position.
PARAMETERS = {
    "hardtanh": "min max", "clamp": "min max", "clip": "min max", "clampmin": "min",
    "leakyrelu": "negative_slope", "elu": "alpha", "gelu": "approximate", "softmax": "dim",
    "add": "other", "sub": "other", "mul": "other", "truediv": "other", "div": "other", "matmul": "other",
    "cat": "dim", "concat": "dim", "transpose": "dim0 dim1", "permute": "dims", "chunk": "chunks dim",
    "split": "chunks dim", "getitem": "index", "pad": "pad mode value",
    "maxpool2d": "kernel_size stride padding dilation ceil_mode",
    "avgpool2d": "kernel_size stride padding ceil_mode count_include_pad divisor_override", "mean": "dim keepdim",
}  # fmt: skip
DEFAULTS = {
    "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "count_include_pad": True, "keepdim": False,
    "negative_slope": 0.01, "alpha": 1.0, "approximate": "none", "mode": "constant", "value": None,
}  # fmt: skip
SYNONYMS = {"min_val": "min", "max_val": "max", "split_size_or_sections": "chunks", "split_size": "chunks"}


def arguments_of(node: fx.Node, name: str, module: nn.Module | None) -> dict[str, Any]:
    """Arguments by name, whether the operator `name` is a module, a function or a method."""
    names = PARAMETERS.get(name, "").split()
    given: dict[str, Any] = {"module": module}
    given |= {key: value for key, value in vars(module).items() if not key.startswith("_")} if module else {}
    first, *others = [*node.args, *(node.kwargs[k] for k in ("input", "tensors") if k in node.kwargs)]
    if name == "permute" and others and not isinstance(others[0], tuple | list):
        others = [others]
    given |= {"input": first, "tensors": first} | dict(zip(names, others, strict=False))
    given |= {key: value for key, value in node.kwargs.items() if key not in ("input", "tensors")}
    return DEFAULTS | {SYNONYMS.get(key, key): value for key, value in given.items()}


class Call:
    """One operator to write: its arguments by name, and its results' shapes.

    `arguments` are those of the module, function or method alike, as `PARAMETERS` names them.
    """

    def __init__(self, node: fx.Node, arguments: dict[str, Any], values: Values, facts: dict[fx.Node, Facts]) -> None:
        self.node, self.arguments, self.values, self.facts = node, arguments, values, facts
        self.graph = values.graph

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def value(self, item: Any) -> Value:
        """The value of a tensor argument; numbers and constant tensors become initializers."""
        if isinstance(item, fx.Node) and item in self.values:
            found = self.values[item]
            assert isinstance(found, Value)
            return found
        if isinstance(item, fx.Node):
            item = self.facts[item].constant
        return Value(self.graph.constant(f"{self.node.name}_constant", item))

    def floats(self, item: Any) -> str:
        """A tensor argument as floats."""
        return self.values.floats(self.value(item))

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node named after this one."""
        return self.graph.add(operator, inputs, self.node.name, **attributes)

    def dims(self, name: str, numbers: Iterable[int]) -> str:
        """Whole numbers as an initializer."""
        return self.graph.constant(f"{self.node.name}_{name}", torch.tensor(list(numbers)), "INT64")

    def shape_of(self, item: fx.Node) -> tuple[int | None, ...]:
        """Shape of a tensor, None where it grows with the batch."""
        shape = self.facts[item].shape
        assert shape is not None
        return shape

    def moved(self, operation: Callable[[str, str], str], item: Any = None) -> Value:
        """Applies `operation(name, zero)`, which only moves values, to 8-bit integers where there are any, else to
        floats; `zero` is the name of the constant zero in that domain.
        """
        value = self.value(self["input"] if item is None else item)
        if value.integers is not None and value.integers.storage.bits == 8:
            moved = operation(value.integers.name, value.integers.zero_point)
            return Value(None, value.integers._replace(name=moved))
        floats = self.values.floats(value)
        if value.integers is not None:  # onnxruntime would move the operator into integers that it has no kernel for
            floats = self.graph.unchanged(floats)
        return Value(operation(floats, self.graph.constant(f"{self.node.name}_zero", 0.0)))
