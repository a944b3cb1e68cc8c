"""Roundings in closed form: from each layer's inputs in the student to the Hessian of its output error.

Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, arXiv 2208.11580, section 3: a convolution is a linear
layer on unfolded inputs. We deviate in two places: inputs are those of the quantized units before, weights and
activations, for every image (in the parallel schedule those of the float network); and each group of a convolution has
a Hessian of its own.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from quantizers.hessian import ClosedForm
from quantizers.layer import CONVOLUTIONS, QuantizedLayer, output_first, quantized_layers
from reconstruction.activations import ActivationCache
from reconstruction.measurement import Measurement, as_soft, relative

log = logging.getLogger(__name__)
ELEMENTS = 2**24  # of the unfolded inputs made at a time: 128 MiB


@torch.no_grad()
def solve_units(cache: ActivationCache, measurement: Measurement) -> list[dict[str, Any]]:
    """Solve the roundings of every layer in the order of the chain, and go on with the outputs of what was solved.

    A layer that runs in several units is solved in the first. One whose output is not linear in unfolded inputs (a
    transposed convolution, a subclass with a forward of its own), or that no image reaches, stays rounded to nearest,
    with a warning.

    Args:
        cache: of the calibrated student.
        measurement: names the images to solve on, and measures errors.

    Returns:
        A row for each unit with layers to solve, with the columns that a learned unit has.
    """
    rows: list[dict[str, Any]] = []
    solved: set[nn.Module] = set()
    for k, unit in enumerate(cache.units):
        cache.enter(k)
        found = _in_order(cache.student_module)
        layers = {layer: name for layer, name in found.items() if layer not in solved and layer.enabled}
        if not layers:
            continue
        started = time.monotonic()
        errors = measurement.power(cache) | measurement.errors(cache, "nearest")
        for layer, name in layers.items():
            _solve_layer(cache, layer, name, measurement.kept)
        solved |= layers.keys()
        after = measurement.errors(cache, "hard")
        errors |= as_soft(after) | after
        row = relative(errors) | {"soft_fraction": 0.0, "seconds": time.monotonic() - started}
        log.info("%s: error %.2e, nearest %.2e", unit.name, row["error_hard"], row["error_nearest"])
        rows.append({"unit": unit.name, "phase": "closed_form"} | row)
    cache.close()
    return rows


def _in_order(unit: fx.GraphModule) -> dict[QuantizedLayer, str]:
    """The layers of a unit and their names, in order of execution, which registration need not be."""
    calls = [str(node.target) for node in unit.graph.nodes if node.op == "call_module"]
    parts = ((call, *found) for call in calls for found in quantized_layers(unit.get_submodule(call)))
    return {layer: ".".join(filter(None, (call, name))) for call, name, layer in parts}


def _solve_layer(cache: ActivationCache, layer: QuantizedLayer, name: str, images: Tensor) -> None:
    assert isinstance(layer.weight_quantizer, ClosedForm)
    if not is_linear_in_unfolded_inputs(layer.layer):
        log.warning(
            "%s: %s cannot be solved in closed form, it is rounded to nearest", name, type(layer.layer).__name__
        )
        return
    H = _hessian(cache, layer, images)
    if H is None:
        log.warning("%s: no calibration image reaches this layer, it is rounded to nearest", name)
        return
    layer.weight_quantizer.solve(output_first(layer.layer), H)


def _hessian(cache: ActivationCache, layer: QuantizedLayer, images: Tensor) -> Tensor | None:
    """`2 X X^T` over `images`, as the layer's inputs now are; None if it is never called."""
    total: list[Tensor] = []

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0] if layer.input_site is None else layer.input_site(inputs[0])
        part = hessian(layer.layer, x)
        total[:] = [total[0] + part if total else part]

    handle = layer.register_forward_pre_hook(add)
    try:
        for part in images.to(cache.index_device).split(cache.batch_size):
            cache.student_module(*cache.pick(cache.student_inputs, part))
    finally:
        handle.remove()
    return total[0] if total else None


def is_linear_in_unfolded_inputs(layer: nn.Module) -> bool:
    """Whether `unfolded` holds for it: a linear layer or a convolution that runs torch's own forward."""
    kinds = (nn.Linear, *CONVOLUTIONS)
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)


def hessian(layer: nn.Module, x: Tensor) -> Tensor:
    """`2 X X^T` of the inputs `x` of a linear layer or a convolution: (groups, K, K), float64.

    K runs over the inputs of a group and the positions of the kernel, in the order of the weight.
    """
    convolution = isinstance(layer, CONVOLUTIONS)
    x = x.reshape(-1, *x.shape[-len(layer.kernel_size) - 1 :] if convolution else x.shape[-1:])
    kernel = layer.weight[0, 0].numel() if convolution else 1
    rows = max(1, ELEMENTS // max(1, x[:1].numel() * kernel))
    products = (X @ X.transpose(1, 2) for X in (unfolded(layer, part) for part in x.split(rows)))
    return 2.0 * functools.reduce(torch.add, products)


def unfolded(layer: nn.Module, x: Tensor) -> Tensor:
    """What each row of the weight is multiplied with, (groups, K, samples), float64.

    `x` is (N, inputs) or (N, C, *positions); a convolution has a sample for every image and position.
    """
    x = x.double()
    if isinstance(layer, nn.Linear):
        return x.T.unsqueeze(0)
    assert isinstance(layer, CONVOLUTIONS)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    spatial = len(layer.kernel_size)
    x = F.pad(x, _pads(layer), mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    images, channels, *rest = x.shape
    x = x.reshape(images, layer.groups, channels // layer.groups, *rest)
    axes = range(3, 3 + spatial)
    x = x.permute(1, 2, *(axis + spatial for axis in axes), 0, *axes)  # groups, inputs, kernel, images, positions
    return x.reshape(layer.groups, layer.weight[0].numel(), -1)


def _pads(layer: Any) -> Sequence[int]:
    """What F.pad takes: before and after each axis, the last axis first."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(pad, pad) for pad in layer.padding]
    return [side for pair in reversed(pairs) for side in pair]
