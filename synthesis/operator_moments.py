"""What each operator does to the mean and variance of its input; what is assumed stands in `propagation`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from quantizers.fold import FrozenNorm
from synthesis import clipped_normal
from synthesis.moments import Moments
from synthesis.operator_call import Call, along_channels, compact, constant, exact, holds_moments

Rule = Callable[[Call], Any]
_GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


def _convolution(call: Call) -> Moments:
    layer, x = call.module, call.maps
    if layer is None:
        raise call.unknown()  # its weight depends on the image
    weight = exact(layer.weight).flatten(2)  # (C', C / groups, positions)

    def apply(kernel: Tensor, x: Tensor) -> Tensor:
        kernel = kernel.view(layer.groups, -1, kernel.shape[1])
        return along_channels(torch.einsum("goi,gi->go", kernel, x.reshape(layer.groups, -1)), x.dim())

    mean, var = apply(weight.sum(2), x.mean), apply(weight.square().sum(2), x.var)
    return Moments(mean if layer.bias is None else mean + along_channels(exact(layer.bias), mean.dim()), var)


def _linear(call: Call) -> Moments:
    layer = call.module
    if layer is None:
        raise call.unknown()
    mean, var = (t.expand(*t.shape[:-1], call.source_shape[-1]) for t in call.source)
    rows = [exact(part) for part in layer.weight.split(256)]  # in parts: a float64 copy of VGG's takes 800 MB
    mean = torch.cat([mean @ part.T for part in rows], -1)
    var = torch.cat([var @ part.square().T for part in rows], -1)
    return Moments(mean if layer.bias is None else mean + exact(layer.bias), var)


BATCH_NORMS = ("batchnorm", "batchnorm1d", "batchnorm2d", "batchnorm3d", "syncbatchnorm")


def stored_output(call: Call) -> Moments:
    """What a BatchNorm gives for an input that has the statistics it stored."""
    mean, var = (_parameter(call.option(name, i)) for i, name in enumerate(("running_mean", "running_var"), start=1))
    if mean is None or var is None:
        raise call.unknown()
    dims = len(call.source_shape)
    entering = Moments(along_channels(mean, dims), along_channels(var, dims))
    return _batch_norm(call._replace(values={**call.values, call.first: entering}))


def _batch_norm(call: Call) -> Moments:
    source = call.source
    if isinstance(call.module, FrozenNorm):
        scale, shift = exact(call.module.scale), exact(call.module.shift)
    else:
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (_parameter(call.option(name, i)) for i, name in enumerate(names, start=1))
        if mean is None or var is None or (call.module is None and call.option("training", 5, False)):
            raise call.unknown()
        scale = (var + call.option("eps", 7, 1e-5)).rsqrt() * (1.0 if weight is None else weight)
        shift = (0.0 if bias is None else bias) - mean * scale
    scale, shift = (along_channels(t, source.mean.dim()) for t in (scale, shift))
    return Moments(source.mean * scale + shift, source.var * scale.square())


def _parameter(value: Any) -> Tensor | None:
    """A parameter of a module or, where a function gets it, the mean of a constant."""
    return value.mean if isinstance(value, Moments) else None if value is None else exact(value)


def _activation(function: Callable[[Moments], Moments]) -> Rule:
    return lambda call: function(call.source)


def _clamp(low: str, high: str, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Rule:
    def rule(call: Call) -> Moments:
        given = [call.option(name, i) for i, name in enumerate((low, high), start=1)]
        if not all(value is None or isinstance(value, int | float) for value in given):
            raise call.unknown()
        return clipped_normal.clamp(call.source, *(b if v is None else v for v, b in zip(given, bounds, strict=True)))

    return rule


def _leaky_relu(call: Call) -> Moments:
    return clipped_normal.leaky_relu(call.source, call.option("negative_slope", 1, 0.01))


def _prelu(call: Call) -> Moments:
    slope = _parameter(call.option("weight", 1))
    assert slope is not None
    return clipped_normal.leaky_relu(call.source, along_channels(slope, call.source.mean.dim()))


def _gelu(call: Call) -> Moments:
    return clipped_normal.gelu(call.source, call.option("approximate", 1, "none"))


def _smooth(call: Call) -> Moments:
    args, kwargs = call.arguments()
    return clipped_normal.transform(call.source, lambda x: call.run(x, *args[1:], **kwargs))


def _area(call: Call) -> int:
    kernel, dims = call.option("kernel_size", 1), len(call.source_shape) - 2
    return kernel**dims if isinstance(kernel, int) else math.prod(kernel) ** (dims // len(kernel))


def _average_pool(call: Call) -> Moments:
    if call.option("divisor_override", 6) is not None:
        raise call.unknown()
    return Moments(call.maps.mean, call.maps.var / _area(call))


def _adaptive_average_pool(call: Call) -> Moments:
    share = 1.0
    for size, out in zip(call.source_shape[2:], call.node.meta["shape"][2:], strict=True):
        windows = [math.ceil((i + 1) * size / out) - i * size // out for i in range(out)]
        share *= sum(1 / window for window in windows) / out
    return Moments(call.maps.mean, call.maps.var * share)


def _max_pool(call: Call) -> Moments:
    return clipped_normal.maximum(call.maps, _area(call))


def _mean(call: Call) -> Moments:
    axes, keep = call.option("dim", 1), call.option("keepdim", 2, False)
    axes = range(len(call.source_shape)) if axes is None else (axes,) if isinstance(axes, int) else axes
    count = math.prod(call.source_shape[axis] for axis in axes)
    mean, var = (t.expand(call.source_shape).mean(tuple(axes), keep) for t in call.source)
    return compact(Moments(mean, var / count))


def _operands(call: Call) -> tuple[Moments, Moments, bool]:
    """Two operands and whether they are one and the same tensor."""
    given = [*call.node.args, *(call.node.kwargs[k] for k in ("input", "other") if k in call.node.kwargs)]
    if len(given) != 2 or len(call.node.args) + len(call.node.kwargs) != 2:
        raise call.unknown()  # alpha, rounding_mode
    values: list[Any] = [call.values[v] if isinstance(v, fx.Node) else v for v in given]
    values = [constant(torch.tensor(float(v))) if isinstance(v, int | float) else v for v in values]
    if not all(isinstance(v, Moments) for v in values):
        raise call.unknown()
    return values[0], values[1], given[0] is given[1]


def _add(call: Call) -> Moments:
    a, b, same = _operands(call)
    return Moments(a.mean + b.mean, 4 * a.var if same else a.var + b.var)


def _subtract(call: Call) -> Moments:
    a, b, same = _operands(call)
    return Moments(a.mean - b.mean, torch.zeros_like(a.var) if same else a.var + b.var)


def _multiply(call: Call) -> Moments:
    a, b, same = _operands(call)
    if same:
        return Moments(a.mean.square() + a.var, 2 * a.var.square() + 4 * a.mean.square() * a.var)
    for gate, x in (call.node.args, call.node.args[::-1]):
        if (
            isinstance(gate, fx.Node)
            and isinstance(x, fx.Node)
            and gate.all_input_nodes == [x]
            and call.operators.name(gate) in _GATES
        ):
            function = _GATES[call.operators.name(gate)]  # x sigmoid(x): anything but independent
            return clipped_normal.transform(
                call.values[x], lambda t, function=function: t * function(t), (-3.0, 0.0, 3.0)
            )
    return Moments(a.mean * b.mean, a.var * b.var + a.var * b.mean.square() + b.var * a.mean.square())


def _divide(call: Call) -> Moments:
    a, b, _ = _operands(call)
    if bool((b.var != 0).any()):
        raise call.unknown()
    return Moments(a.mean / b.mean, a.var / b.mean.square())


def _rearrange(call: Call) -> Any:
    """Run the operator itself on means and on variances."""
    mean, var = (call.run(*args, **kwargs) for args, kwargs in (call.arguments(0), call.arguments(1)))
    if isinstance(mean, Tensor):
        return compact(Moments(mean, var))
    return tuple(Moments(m, v) for m, v in zip(mean, var, strict=True))


def _gather(call: Call) -> Moments:
    axis = call.module.axis % len(call.source_shape)
    mean, var = (t.expand(*t.shape[:axis], call.source_shape[axis], *t.shape[axis + 1 :]) for t in call.source)
    index = call.module.index.cpu()
    return Moments(mean.index_select(axis, index), var.index_select(axis, index))


def _pad(call: Call) -> Moments:
    """New channels hold the constant; new positions are borders, and ignored."""
    source, shape = call.source, call.node.meta["shape"]
    pads = tuple(call.option("pad" if call.module is None else "padding", 1))
    borders, channels = pads[: 2 * (len(shape) - 2)], pads[2 * (len(shape) - 2) :]
    if not any(channels):
        return source
    if call.option("mode", 2, "constant") != "constant" or len(channels) > 2:
        raise call.unknown()
    mean, var = (t.expand(-1, call.source_shape[1], *t.shape[2:]) for t in source)
    edge = ((0,) * len(borders)) + channels
    return Moments(F.pad(mean, edge, value=call.option("value", 3) or 0.0), F.pad(var, edge))


def _look(call: Call) -> Any:
    """A size or a shape, no feature map."""
    args, kwargs = call.arguments(0)
    value = call.run(*args, **kwargs)
    if isinstance(value, Tensor) or not holds_moments(call.source):
        raise call.unknown()
    return value


def _table(*rows: tuple[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in rows for name in names.split()}


# Names as `Operators.name` gives them: those of the module, the function and the method are alike.
RULES: dict[str, Rule] = _table(
    ("conv1d conv2d conv3d", _convolution),
    ("linear", _linear),
    (" ".join((*BATCH_NORMS, "frozennorm")), _batch_norm),
    ("relu", _activation(clipped_normal.relu)),
    ("relu6", _activation(clipped_normal.relu6)),
    ("hardtanh", _clamp("min_val", "max_val", (-1.0, 1.0))),
    ("clamp clip", _clamp("min", "max")),
    ("leakyrelu", _leaky_relu),
    ("prelu", _prelu),
    ("silu", _activation(clipped_normal.silu)),
    ("hardswish", _activation(clipped_normal.hardswish)),
    ("hardsigmoid", _activation(clipped_normal.hardsigmoid)),
    ("sigmoid", _activation(clipped_normal.sigmoid)),
    ("tanh", _activation(clipped_normal.tanh)),
    ("gelu", _gelu),
    ("elu selu celu softplus mish", _smooth),
    ("avgpool1d avgpool2d avgpool3d", _average_pool),
    ("adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d", _adaptive_average_pool),
    ("maxpool1d maxpool2d maxpool3d", _max_pool),
    ("mean", _mean),
    ("add", _add),
    ("sub", _subtract),
    ("mul", _multiply),
    ("div truediv", _divide),
    ("channelgather", _gather),
    ("pad zeropad2d constantpad2d reflectionpad2d replicationpad2d", _pad),
    ("identity dropout dropout2d contiguous clone detach to float", lambda call: call.source),
    ("size dim getattr numel", _look),
    ("cat concat stack getitem chunk split tensorsplit unbind narrow select flip roll", _rearrange),
    ("flatten unflatten view reshape permute transpose movedim squeeze unsqueeze expand channelshuffle", _rearrange),
)
