"""The operators of a traced network in ONNX, by the names that `quantizers.operators` gives them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deployment import onnx_movement as movement
from deployment.onnx_call import Call, Result
from deployment.onnx_movement import numbers, pair
from deployment.onnx_values import Value


def unary(operator: str, **names: str) -> Callable[[Call], Value]:
    """An operator of one tensor; `names`: ONNX attribute -> argument."""

    def write(call: Call) -> Value:
        attributes = {attribute: float(call[name]) for attribute, name in names.items()}
        return Value(call.add(operator, [call.floats(call["input"])], **attributes))

    return write


def binary(operator: str) -> Callable[[Call], Value]:
    """An operator of two tensors or a tensor and a number."""

    def write(call: Call) -> Value:
        if call.arguments.get("alpha", 1) != 1 or call.arguments.get("rounding_mode") is not None:
            raise ValueError(f"export: {call.node.name} has alpha or rounding_mode, which is not written")
        return Value(call.add(operator, [call.floats(call["input"]), call.floats(call["other"])]))

    return write


def clip_bounds(name: str, arguments: dict[str, Any]) -> tuple[float, float] | None:
    """Lower and upper bound of an activation that only clips; None for every other operator."""
    if name in ("relu", "relu6"):
        return 0.0, 6.0 if name == "relu6" else math.inf
    if name not in ("hardtanh", "clamp", "clip", "clampmin"):
        return None
    low, high = arguments.get("min"), arguments.get("max")
    if not all(bound is None or isinstance(bound, int | float) for bound in (low, high)):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def clip(call: Call, bounds: tuple[float, float]) -> Value:
    """ReLU, ReLU6, hardtanh, clamp."""
    source = call.floats(call["input"])
    if bounds == (0.0, math.inf):
        return Value(call.add("Relu", [source]))
    ends = [call.graph.constant(f"{call.node.name}_bound", b) if math.isfinite(b) else "" for b in bounds]
    return Value(call.add("Clip", [source, *ends]))


def hardsigmoid(call: Call) -> Value:
    return Value(call.add("HardSigmoid", [call.floats(call["input"])], alpha=1 / 6, beta=0.5))


def silu(call: Call) -> Value:
    x = call.floats(call["input"])
    return Value(call.add("Mul", [x, call.add("Sigmoid", [x])]))


def gelu(call: Call) -> Value:
    return Value(call.add("Gelu", [call.floats(call["input"])], approximate=call["approximate"]))


def softmax(call: Call) -> Value:
    return Value(call.add("Softmax", [call.floats(call["input"])], axis=call["dim"]))


def concatenate(call: Call) -> Value:
    return Value(call.add("Concat", [call.floats(item) for item in call["tensors"]], axis=call.arguments.get("dim", 0)))


def avgpool2d(call: Call) -> Value:
    if call.arguments.get("divisor_override"):
        raise ValueError(f"export: {call.node.name} has a divisor_override, which is not written")
    padding = pair(call["padding"])
    attributes = {"kernel_shape": pair(call["kernel_size"]), "pads": padding + padding}
    attributes |= {name: int(call[name]) for name in ("ceil_mode", "count_include_pad")}
    attributes["strides"] = pair(call["stride"] or call["kernel_size"])
    return Value(call.add("AveragePool", [call.floats(call["input"])], **attributes))


def adaptiveavgpool2d(call: Call) -> Value:
    """To one value a channel, or where the output divides the input."""
    size = [s or 1 for s in call.shape_of(call["input"])[-2:]]
    target = [s or 1 for s in call.shape_of(call.node)[-2:]]
    if target == size:
        return call.value(call["input"])
    if target == [1, 1]:
        return Value(call.add("GlobalAveragePool", [call.floats(call["input"])]))
    if any(s % t for s, t in zip(size, target, strict=True)):
        raise ValueError(f"export: {call.node.name} pools {size} to {target}, which is no even division")
    kernel = [s // t for s, t in zip(size, target, strict=True)]
    return Value(call.add("AveragePool", [call.floats(call["input"])], kernel_shape=kernel, strides=kernel))


def mean(call: Call) -> Value:
    source = call["input"]
    if call.arguments.get("dim") is None:
        raise ValueError(f"export: {call.node.name} is the mean of the whole batch, which is not written")
    rank, dims = len(call.shape_of(source)), numbers(call["dim"])
    keep = bool(call["keepdim"])
    if rank == 4 and sorted(d % rank for d in dims) == [2, 3]:  # integer kernels exist for this one
        pooled = call.add("GlobalAveragePool", [call.floats(source)])
        return Value(pooled if keep else call.add("Flatten", [pooled], axis=1))
    axes = call.dims("axes", dims)
    return Value(call.add("ReduceMean", [call.floats(source), axes], keepdims=int(keep)))


def per_channel(scale: Tensor, shift: Tensor, call: Call) -> Value:
    """x * scale + shift, both (C,)."""
    shape = (1, -1, *(1,) * (len(call.shape_of(call["input"])) - 2))
    scaled = call.graph.constant(f"{call.node.name}_scale", scale.view(shape))
    shifted = call.graph.constant(f"{call.node.name}_shift", shift.view(shape))
    return Value(call.add("Add", [call.add("Mul", [call.floats(call["input"]), scaled]), shifted]))


def frozen_norm(call: Call) -> Value:
    return per_channel(call["module"].scale, call["module"].shift, call)


def batch_norm(call: Call) -> Value:
    norm: Any = call["module"]
    scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
    shift = (0.0 if norm.bias is None else norm.bias) - norm.running_mean * scale
    return per_channel(scale, shift, call)


def layer_norm(call: Call) -> Value:
    norm: nn.LayerNorm = call["module"]
    names = [call.graph.constant(f"{call.node.name}_{n}", t) for n, t in norm.named_parameters()]
    axis = -len(norm.normalized_shape)
    source = call.floats(call["input"])
    return Value(call.add("LayerNormalization", [source, *names], axis=axis, epsilon=norm.eps))


WRITERS: dict[str, Callable[[Call], Result]] = {
    "sigmoid": unary("Sigmoid"), "tanh": unary("Tanh"), "exp": unary("Exp"), "abs": unary("Abs"),
    "sqrt": unary("Sqrt"), "softplus": unary("Softplus"), "softsign": unary("Softsign"), "mish": unary("Mish"),
    "leakyrelu": unary("LeakyRelu", alpha="negative_slope"), "elu": unary("Elu", alpha="alpha"),
    "hardswish": unary("HardSwish"), "hardsigmoid": hardsigmoid, "silu": silu, "gelu": gelu, "softmax": softmax,
    "add": binary("Add"), "sub": binary("Sub"), "mul": binary("Mul"), "truediv": binary("Div"), "div": binary("Div"),
    "matmul": binary("MatMul"), "cat": concatenate, "concat": concatenate,
    "avgpool2d": avgpool2d, "adaptiveavgpool2d": adaptiveavgpool2d, "mean": mean, "frozennorm": frozen_norm,
    "batchnorm2d": batch_norm, "batchnorm1d": batch_norm, "layernorm": layer_norm,
    "transpose": movement.transpose, "permute": movement.permute, "chunk": movement.chunk, "split": movement.chunk,
    "getitem": movement.getitem, "pad": movement.pad, "maxpool2d": movement.maxpool2d,
    "channelgather": movement.channel_gather,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"), movement.reshaped),
    **dict.fromkeys(("contiguous", "clone", "detach", "identity", "float"), movement.same),
}  # fmt: skip
