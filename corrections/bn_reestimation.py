"""BN re-estimation: each layer's output channels get back the mean and deviation that BatchNorm trained them to have.

Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, arXiv 2006.10518
(para-normalisation). A normalisation that is an identity for the float network, gamma' = sqrt(gamma^2 + eps), beta' =
beta, is put behind every folded layer, its statistics are measured in the quantized network, and it is absorbed again:

    k = gamma' / sqrt(var + eps),   W' = k W,   b' = k (b - mu) + beta',   weight scales times k, integers unchanged

We deviate in the statistics, which are pooled exactly over all images: the released code averages five batches with
momentum 0.1, after which 59 % of the old statistics remain. And gamma is the stored deviation of the output, see
`StoredNorm`; and k is bounded, since a channel that quantization made constant would get an enormous one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from corrections.base import Calibration, Facts, StudentCorrection
from corrections.execution import output_moments, walk
from corrections.layers import own_layers, scale_outputs, shift_outputs
from quantizers.constraints import PowerOfTwo
from quantizers.convert import Conversion
from quantizers.layer import QuantizedLayer
from quantizers.trace import StoredNorm

Target = Literal["batch_norm", "reference"]


class BNReestimation(StudentCorrection):
    """Layer by layer in order of execution, each measured on what it gets once all before it are corrected.

    Args:
        target: "batch_norm": what the folded BatchNorm layers stored; layers without one are left alone. "reference":
            mean and deviation of the float network's own outputs on the same images, for all layers; for networks
            without BatchNorm, and for images whose statistics are not those that were stored.
        eps: added to variances.
        largest_gain: bound on k and on 1 / k; null: none.

    Raises:
        ValueError: if a number or the target is unknown; later, if there was no BatchNorm for "batch_norm", or a weight
            has one scale for all its channels.
    """

    def __init__(self, target: Target = "batch_norm", *, eps: float = 1e-5, largest_gain: float | None = 4.0) -> None:
        if target not in ("batch_norm", "reference"):
            raise ValueError(f"target: expected 'batch_norm' or 'reference', got {target!r}")
        if eps <= 0:
            raise ValueError(f"eps: expected a positive number, got {eps}; a dead channel needs it to stay finite")
        if largest_gain is not None and largest_gain < 1:
            raise ValueError(f"largest_gain: expected at least 1, or null for no bound, got {largest_gain}")
        self.target, self.eps, self.largest_gain = target, eps, largest_gain

    def expect(self, conversion: Conversion) -> None:
        layers = own_layers(conversion.student)
        if self.target == "batch_norm":
            layers = {path: node for path, node in layers.items() if path in conversion.norms}
        if not layers:
            raise ValueError(
                "target: expected a network with BatchNorm behind its layers for 'batch_norm', got one without; use "
                "corrections=bn_reestimation_reference, which takes the float network's statistics on the same images"
            )
        for path in layers:
            layer = conversion.student.get_submodule(path)
            if not isinstance(layer, QuantizedLayer):
                continue
            if layer.weight_quantizer.channel_axis is None:
                raise ValueError(
                    f"weight.channel_axis: expected a scale for each output channel, got one for all of {path!r}; set "
                    "weight.channel_axis=0, or leave out BN re-estimation, whose factors scales have to follow"
                )
            if isinstance(layer.weight_quantizer.range, PowerOfTwo):
                raise ValueError(
                    "protocol.power_of_two: expected false, got true; leave out BN re-estimation, since the scales of "
                    f"{path!r} have to follow its factors, which are no powers of two"
                )

    def apply(self, calibration: Calibration) -> Facts:
        self.expect(calibration.conversion)
        student, images, batch_size = calibration.conversion.student, calibration.images, calibration.batch_size
        wanted = self._wanted(calibration)
        gains, shifts, bounded = [1.0], [0.0], 0
        for path, module, moments in walk(student, wanted, images, batch_size):
            seen = moments()
            beta, gamma = (t.to(seen.mean) for t in wanted[path])
            gain = ((gamma.square() + self.eps) / (seen.var + self.eps)).sqrt()
            if seen.count < 2:  # one observation has no deviation: only the mean is set
                gain = torch.ones_like(gain)
            if self.largest_gain is not None:
                kept = gain.clamp(1 / self.largest_gain, self.largest_gain)
                bounded += int((kept != gain).sum())
                gain = kept
            scale_outputs(module, gain)
            shift_outputs(module, beta - gain * seen.mean)
            gains += [float(gain.min()), float(gain.max())]
            shifts.append(float((seen.mean - beta).abs().max()))
        facts = {"layers": len(wanted), "gains": [min(gains), max(gains)], "largest_shift": max(shifts)}
        return facts | {"bounded_channels": bounded}

    def _wanted(self, calibration: Calibration) -> Mapping[str, StoredNorm]:
        conversion = calibration.conversion
        layers = own_layers(conversion.student)
        if self.target == "reference":
            found = output_moments(conversion.reference, layers, calibration.images, calibration.batch_size)
            return {path: StoredNorm(m.mean, m.var.sqrt()) for path, m in found.items()}
        return {path: conversion.norms[path] for path in layers if path in conversion.norms}
