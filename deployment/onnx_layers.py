"""Convolutions, linear layers and quantized tensors in ONNX: QuantizeLinear, DequantizeLinear, weights in integers.

A bias is INT32 at the scale of weight times input where kernels compute in integers: the layer reads at most 8 bits and
its output is quantized, or it is a linear layer. Elsewhere it stays in float. Rounding the bias costs nothing at 8 bits
but is felt below 4, where a step of weight times input is large; onnxruntime would round it in these places anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deployment.containers import StoredWeight, activation_storage, weight_storage
from deployment.onnx_graph import OnnxGraph, Storage
from deployment.onnx_movement import pair
from deployment.onnx_values import Integers, Value, Values
from quantizers.layer import TRANSPOSED, ActivationSite, QuantizedLayer, output_first

BIAS = Storage(32, signed=True)


class Weight(NamedTuple):
    """`floats`: ONNX name of the weight, dequantized, in the layer's own layout.

    `scale`: (C,) or (), None where the weight is float.
    """

    floats: str
    scale: Tensor | None


@torch.no_grad()
def quantized(values: Values, value: Value, site: ActivationSite, name: str, container: str, clip: Any = None) -> Value:
    """QuantizeLinear as `site` does it, `clip` (low, high) of an activation function before it included.

    A clip becomes the ends of the integers: rounding is monotonic, so that `round(min(x, h) / s)` is
    `min(round(x / s), round(h / s))`. Ends that the type does not have itself are a Min or Max of integers, behind
    which runtimes still find integers; 4- and 16-bit types know no Min, so there the float is clipped instead.
    """
    graph, quantizer = values.graph, site.quantizer
    grid, step = quantizer.grid, quantizer.step().detach().float().cpu().reshape(())
    zero = int(quantizer.offset()) - grid.low
    storage = activation_storage(grid, container)
    low, high = 0, grid.high - grid.low
    if clip is not None:
        low, high = (int(((torch.tensor(b) / step).round() + zero).clamp(low, high)) for b in clip)
    source = values.floats(value)
    scale, zero_point = graph.constant(f"{name}_scale", step), graph.constant(f"{name}_zero_point", zero, storage)
    needs_low, needs_high = low > storage.low, high < storage.high
    if storage.bits != 8 and (needs_low or needs_high):
        # not Clip, which onnxruntime tries to join to the QuantizeLinear behind it, and fails on 4 bits
        lowest, highest = (graph.constant(f"{name}_bound", (end - zero) * step) for end in (low, high))
        source = graph.add("Max", [graph.add("Min", [source, highest], f"{name}_clipped"), lowest], f"{name}_clipped")
    integers = graph.add("QuantizeLinear", [source, scale, zero_point], f"{name}_quantized")
    if storage.bits == 8 and needs_high:
        integers = graph.add("Min", [integers, graph.constant(f"{name}_high", high, storage)], f"{name}_at_most")
    if storage.bits == 8 and needs_low:
        integers = graph.add("Max", [integers, graph.constant(f"{name}_low", low, storage)], f"{name}_at_least")
    return Value(None, Integers(integers, scale, zero_point, step, storage))


class Layers:
    """Writes layers; the weights of one that is called twice are written once.

    Attributes:
        biases: of layers whose bias is in integers, what these stand for (C,).
        float_biases: layers with quantized weights and input whose bias stayed float, and why.
    """

    def __init__(self, values: Values, container: str) -> None:
        self.values, self.container = values, container
        self.graph: OnnxGraph = values.graph
        self.biases: dict[str, Tensor] = {}
        self.float_biases: dict[str, str] = {}
        self._weights: dict[tuple[str, bool], Weight] = {}

    @torch.no_grad()
    def write(
        self, path: str, module: nn.Module, value: Value, name: str, *, rank: int, output_quantized: bool
    ) -> Value:
        """The call `name` of the layer at `path` on an input with `rank` axes."""
        layer: Any = module.layer if isinstance(module, QuantizedLayer) else module
        integer = output_quantized or isinstance(layer, nn.Linear)  # linear layers have kernels from integers to floats
        fast = integer and value.integers is not None and value.integers.storage.bits <= 8
        weight = self._weight(path, module, layer, fast)
        bias = self._bias(path, layer, weight, value, name, integer)
        inputs = [self.values.floats(value), weight.floats]
        if isinstance(layer, nn.Linear):
            written = self._linear(inputs, bias, name, rank)
            return Value(self.graph.unchanged(written) if weight.scale is None and output_quantized else written)
        if layer.padding_mode != "zeros":
            raise ValueError(f"export: {path} pads by mode {layer.padding_mode!r}, which is not written")
        operator = "ConvTranspose" if isinstance(layer, TRANSPOSED) else "Conv"
        attributes = {"kernel_shape": list(layer.kernel_size), "strides": pair_of(layer, "stride")}
        attributes |= {"dilations": pair_of(layer, "dilation"), "group": layer.groups, "pads": pads(layer)}
        if operator == "ConvTranspose":
            attributes["output_padding"] = pair_of(layer, "output_padding")
        written = self.graph.add(operator, [*inputs, *([bias] if bias else [])], name, **attributes)
        in_float = weight.scale is None or (layer.bias is not None and path in self.float_biases)
        if output_quantized and value.integers is not None and in_float:
            # onnxruntime would quantize weight and bias by itself, to 8 and 32 bits, whether they fit or not
            written = self.graph.unchanged(written)
        return Value(written)

    def _linear(self, inputs: list[str], bias: str | None, name: str, rank: int) -> str:
        if rank == 2:
            return self.graph.add("Gemm", [*inputs, *([bias] if bias else [])], name, transB=1)
        transposed = self.graph.add("Transpose", inputs[1:], f"{name}.transposed", perm=[1, 0])
        product = self.graph.add("MatMul", [inputs[0], transposed], name)
        return self.graph.add("Add", [product, bias], f"{name}_sum") if bias else product

    def _weight(self, path: str, module: nn.Module, layer: Any, fast: bool) -> Weight:
        if (path, fast) not in self._weights:
            self._weights[path, fast] = self._written(path, module, layer, fast)
        return self._weights[path, fast]

    def _written(self, path: str, module: nn.Module, layer: Any, fast: bool) -> Weight:
        if not isinstance(module, QuantizedLayer) or not module.enabled:
            return Weight(self.graph.constant(f"{path}.weight", layer.weight), None)
        quantizer = module.weight_quantizer
        q, scale, zero_point = quantizer.integers(output_first(layer))
        if not torch.equal((q - zero_point) * scale, quantizer(output_first(layer))):
            raise ValueError(
                f"export: the roundings of layer {path} are not final; export a reconstructed student, or "
                "quantizers.layer.hardened_copy() of it"
            )
        stored = weight_storage(q, zero_point.to(torch.int32), quantizer.grid, self.container, fast=fast)
        name = self._dequantized(path, stored, scale)
        if isinstance(layer, TRANSPOSED):
            name = self._own_layout(path, name, layer)
        return Weight(name, scale.flatten())

    def _dequantized(self, path: str, stored: StoredWeight, scale: Tensor) -> str:
        """Output channels first. Not (inputs, outputs) for a linear layer: onnxruntime would compute one with a float
        input in blocks of 8 bits (MatMulNBits), which is off by a percent.
        """
        shape = () if scale.numel() == 1 and scale.ndim == 0 else (-1,)
        inputs = [
            self.graph.constant(f"{path}.weight_integers", stored.integers, stored.storage),
            self.graph.constant(f"{path}.weight_scale", scale.reshape(shape)),
            self.graph.constant(f"{path}.weight_zero_point", stored.zero_point.reshape(shape), stored.storage),
        ]
        axis = {"axis": 0} if shape else {}
        return self.graph.add("DequantizeLinear", inputs, f"{path}.weight", **axis)

    def _own_layout(self, path: str, name: str, layer: Any) -> str:
        """Transposed convolutions hold their inputs first; their scales belong to the outputs."""
        inputs, outputs = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
        rest = list(layer.weight.shape[2:])

        def reshaped(name: str, dims: list[int]) -> str:
            return self.graph.add(
                "Reshape", [name, self.graph.constant(f"{path}.dims", torch.tensor(dims), "INT64")], f"{path}.shaped"
            )

        grouped = reshaped(name, [layer.groups, outputs, inputs, *rest])
        moved = self.graph.add("Transpose", [grouped], f"{path}.moved", perm=[0, 2, 1, *range(3, 3 + len(rest))])
        return reshaped(moved, [layer.groups * inputs, outputs, *rest])

    def _bias(self, path: str, layer: Any, weight: Weight, value: Value, name: str, integer: bool) -> str | None:
        if layer.bias is None:
            return None
        bias = layer.bias.detach().float().cpu()
        if weight.scale is not None and value.integers is not None:
            scale = (value.integers.step * weight.scale.cpu()).expand(len(bias)).contiguous()
            integers = (bias.double() / scale.double()).round()
            if not integer:
                why = "the output is not quantized"
            elif value.integers.storage.bits > 8:
                why = "the input has more than 8 bits"
            elif bool((integers.abs() >= 2**31).any()):
                why = "it does not fit 32 bits at the scale of weight times input"
            elif path in self.biases and not torch.equal(self.biases[path], integers.float() * scale):
                why = "the layer is called on inputs with several scales"
            else:
                self.biases[path] = integers.float() * scale
                names = [self.graph.constant(f"{name}.bias_integers", integers, BIAS)]
                names += [self.graph.constant(f"{name}.bias_scale", scale)]
                names += [self.graph.constant(f"{name}.bias_zero_point", torch.zeros(len(bias)), BIAS)]
                return self.graph.add("DequantizeLinear", names, f"{name}.bias", axis=0)
            self.float_biases[path] = why
        return self.graph.constant(f"{name}.bias", bias)


def pair_of(layer: Any, name: str) -> list[int]:
    value = getattr(layer, name)
    return pair(value) if len(layer.kernel_size) == 2 else list(value)


def pads(layer: Any) -> list[int]:
    """ONNX's pads: before each axis, then behind each."""
    if isinstance(layer.padding, str):
        whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        whole = whole if layer.padding == "same" else [0] * len(whole)
        return [w // 2 for w in whole] + [w - w // 2 for w in whole]
    return [*layer.padding, *layer.padding]
