"""Operators that only move values about: reshaping, slicing, padding, the largest of a window.

They are done on integers where the tensor is in 8-bit integers, so that the layer behind them still reads integers and
runs on integer kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import fx

from deployment.onnx_call import Call, Result
from deployment.onnx_values import Value


def reshaped(call: Call) -> Value:
    """Whatever gives the values another shape in the same order."""
    target = call.shape_of(call.node)
    if target.count(None) > 1:
        raise ValueError(f"export: {call.node.name} has several axes that grow with the batch, which is not written")
    dims = call.dims("shape", (-1 if size is None else size for size in target))
    return call.moved(lambda x, _: call.add("Reshape", [x, dims]))


def transpose(call: Call) -> Value:
    axes = list(range(len(call.shape_of(call["input"]))))
    a, b = call["dim0"], call["dim1"]
    axes[a], axes[b] = axes[b], axes[a]
    return call.moved(lambda x, _: call.add("Transpose", [x], perm=axes))


def permute(call: Call) -> Value:
    rank = len(call.shape_of(call["input"]))
    axes = [axis % rank for axis in numbers(call["dims"])]
    return call.moved(lambda x, _: call.add("Transpose", [x], perm=axes))


def same(call: Call) -> Value:
    """contiguous, clone, an identity."""
    return call.value(call["input"])


def chunk(call: Call) -> list[Value]:
    """chunk into a number of parts; split into parts of a size, or of several sizes."""
    source, axis, given = call["input"], call.arguments.get("dim", 0), call["chunks"]
    size = call.shape_of(source)[axis]
    if size is None:
        raise ValueError(f"export: {call.node.name} splits the batch, which is not written")
    if isinstance(given, int):
        length = (
            -(-size // given) if "chunk" in (call.node.target, getattr(call.node.target, "__name__", "")) else given
        )
        given = [min(length, size - start) for start in range(0, size, length)]
    ends = list(itertools.accumulate(given))
    return [_sliced(call, source, [(axis, end - part, end, 1)]) for part, end in zip(given, ends, strict=True)]


def getitem(call: Call) -> Result:
    """x[i], x[:, a:b, ::s] on tensors, [i] on parts of a split."""
    source, index = call["input"], call["index"]
    if isinstance(found := call.values[source], list):
        return found[index]
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at, rank = index.index(Ellipsis), len(call.shape_of(source))
        index = (*index[:at], *(slice(None),) * (rank - len(index) + 1), *index[at + 1 :])
    if not all(isinstance(i, int | slice) for i in index):
        raise ValueError(f"export: {call.node.name} picks elements by {index}, which is not written")
    cuts = []
    for axis, i in enumerate(index):
        low, high, step = (i, i + 1, 1) if isinstance(i, int) else (i.start, i.stop, i.step)
        if isinstance(i, int) and i == -1:
            high = None
        cuts.append((axis, low or 0, 2**31 - 1 if high is None else high, step or 1))
    cuts = [cut for cut in cuts if cut[1:] != (0, 2**31 - 1, 1)]
    value = _sliced(call, source, cuts) if cuts else call.value(source)
    gone = [axis for axis, i in enumerate(index) if isinstance(i, int)]
    if not gone:
        return value
    axes = call.dims("axes", gone)
    operation = value.integers.name if value.integers else value.floats
    squeezed = call.add("Squeeze", [str(operation), axes])
    return Value(None, value.integers._replace(name=squeezed)) if value.integers else Value(squeezed)


def _sliced(call: Call, source: fx.Node, cuts: list[tuple[int, int, int, int]]) -> Value:
    axes, starts, ends, steps = zip(*cuts, strict=True)
    names = [call.dims(n, v) for n, v in (("starts", starts), ("ends", ends), ("axes", axes), ("steps", steps))]
    return call.moved(lambda x, _: call.add("Slice", [x, *names]), source)


def pad(call: Call) -> Value:
    """F.pad with a constant; zeros stay integers."""
    amounts, rank = list(call["pad"]), len(call.shape_of(call["input"]))
    if (call["mode"] or "constant") != "constant":
        raise ValueError(f"export: {call.node.name} pads by mode {call['mode']!r}, which is not written")
    before, after = [0] * rank, [0] * rank
    for i in range(len(amounts) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = amounts[2 * i], amounts[2 * i + 1]
    dims, value = call.dims("pads", before + after), call.arguments.get("value") or 0.0
    if value == 0.0:
        return call.moved(lambda x, zero: call.add("Pad", [x, dims, zero]))
    filling = call.graph.constant(f"{call.node.name}_value", float(value))
    return Value(call.add("Pad", [call.floats(call["input"]), dims, filling]))


def maxpool2d(call: Call) -> Value:
    padding = pair(call["padding"])
    attributes = {"kernel_shape": pair(call["kernel_size"]), "pads": padding + padding}
    attributes["strides"] = pair(call["stride"] or call["kernel_size"])
    attributes |= {"dilations": pair(call["dilation"]), "ceil_mode": int(call["ceil_mode"])}
    return call.moved(lambda x, _: call.add("MaxPool", [x], **attributes))


def channel_gather(call: Call) -> Value:
    module: Any = call["module"]
    index = call.dims("index", module.index.tolist())
    return call.moved(lambda x, _: call.add("Gather", [x, index], axis=module.axis))


def pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def numbers(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else [*value]
