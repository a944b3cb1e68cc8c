"""Bias correction: quantization shifts the mean of a layer's output channels; the bias takes the shift back.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ), ICCV 2019, arXiv
1906.04721, section 4.2: b -= E[W_q x_q] - E[W x]. The expectations are means over calibration images, or follow from
the statistics that BatchNorm stored. We deviate in the analytic form: behind additions and poolings the means are
propagated, where the paper covers BatchNorm and ReLU only.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, fx

from corrections.base import Calibration, Facts, StudentCorrection
from corrections.execution import output_moments, walk
from corrections.layers import float_layer, own_layers, shift_outputs
from quantizers.layer import TRANSPOSED, QuantizedLayer, output_first

Layers = Literal["all", "without_batch_norm"]


class BiasCorrection(StudentCorrection):
    """From images: every channel of every layer gets the mean that it has in the float reference.

    Layers are corrected in order of execution, each on the quantized inputs that it gets once all before it are
    corrected. Layers that run more than once, or stand inside a module that could not be traced, are left alone.

    Args:
        layers: "all", or "without_batch_norm": those into which no BatchNorm was folded. After BN re-estimation the
            others have the means that BatchNorm stored; to move them to those of the images, where these differ, and
            leave the deviations, makes activations shrink from layer to layer.

    Raises:
        ValueError: if `layers` is unknown.
    """

    def __init__(self, *, layers: Layers = "all") -> None:
        if layers not in get_args(Layers):
            raise ValueError(f"layers: expected one of {', '.join(get_args(Layers))}, got {layers!r}")
        self.layers = layers

    def apply(self, calibration: Calibration) -> Facts:
        conversion, images, batch_size, _ = calibration
        student, reference = conversion.student, conversion.reference
        layers = list(own_layers(student))
        if self.layers == "without_batch_norm":
            layers = [path for path in layers if path not in conversion.norms]
        wanted = output_moments(reference, layers, images, batch_size)
        shifts = []
        for path, module, moments in walk(student, layers, images, batch_size):
            shift = wanted[path].mean - moments().mean
            shift_outputs(module, shift)
            shifts.append(float(shift.abs().max()))
        return {"layers": len(shifts), "largest_shift": max(shifts, default=0.0)}


class AnalyticBiasCorrection(StudentCorrection):
    """Without images: b -= (W_q - W) E[x], with E[x] from stored statistics; errors of activations are not counted.

    Borders are ignored: padded positions count as if the input had its mean there. Layers whose input has no known mean
    are left alone, and named in the record as `skipped`.
    """

    needs_images = False

    def apply(self, calibration: Calibration) -> Facts:
        student, reference, *_ = calibration.conversion
        means = calibration.expected_means()
        shifts: list[float] = []
        skipped: list[str] = []
        inputs = {str(node.target): node.all_input_nodes[0].name for node in reference.graph.nodes if _is_call(node)}
        for path in own_layers(student):
            module = student.get_submodule(path)
            if not isinstance(module, QuantizedLayer):
                continue
            shift = None if path not in inputs else _expected_shift(module, means.get(inputs[path]))
            if shift is None:
                skipped.append(path)
                continue
            shift_outputs(module, -shift)
            shifts.append(float(shift.abs().max()))
        return {"layers": len(shifts), "largest_shift": max(shifts, default=0.0), "skipped": skipped}


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module" and bool(node.all_input_nodes)


@torch.no_grad()
def _expected_shift(module: QuantizedLayer, mean: Tensor | None) -> Tensor | None:
    """(W_q - W) E[x], (C,); None where the mean of each input channel is not known."""
    layer = float_layer(module)
    weight = output_first(layer).double()
    error = output_first(layer, module.quantized_weight()).double() - weight
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED) or mean is None or mean.numel() != groups * weight.shape[1]:
        return None  # how many taps of a transposed convolution meet depends on the position
    mean = mean.to(error).view(groups, 1, -1)  # (G, 1, I)
    error = error.flatten(2).sum(2) if error.dim() > 2 else error  # (O, I)
    return (error.view(groups, -1, mean.shape[2]) * mean).sum(2).flatten()
