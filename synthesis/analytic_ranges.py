"""Activation ranges without any image: from the moments that BatchNorm stored, or that propagate from the weights.

beta +- n gamma: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ), ICCV
2019, arXiv 1906.04721. Optimal clipping of normal and Laplace tensors: Banner, Nahshan, Soudry, "Post Training 4-bit
Quantization of Convolutional Networks for Rapid-Deployment" (ACIQ), NeurIPS 2019, arXiv 1810.05723. Deviates: behind
additions, poolings and gates the moments are propagated (see `synthesis.propagation`); ACIQ is per tensor, as all
activations here are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import fx

from quantizers.affine import from_bounds
from quantizers.convert import Conversion
from quantizers.layer import ActivationSite, sites
from quantizers.operators import Operators
from synthesis.moments import Moments
from synthesis.propagation import propagate_graph

# half-widths that lose least, in scales b of a Laplace and deviations of a normal tensor, by bits
LAPLACE = {2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89}
GAUSS = {1: 1.24, 2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}
CLIPPED = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}


class Shape(NamedTuple):
    """What is known of a tensor: its channels are normal with these moments, then clipped to `low..high`."""

    moments: Moments
    low: float
    high: float


class AnalyticRange(ABC):
    """A rule that turns the shape of a tensor into a range."""

    @abstractmethod
    def bounds(self, shape: Shape, bits: int) -> tuple[float, float]:
        """Return the lowest and the highest value to represent, before the tensor's own clipping."""


class Deviations(AnalyticRange):
    """The smallest beta - n gamma and the largest beta + n gamma of any channel (DFQ).

    Args:
        n: number of deviations; 6 in DFQ.
    """

    def __init__(self, n: float = 6.0) -> None:
        if n <= 0:
            raise ValueError(f"calibration.rule.n: expected a positive number of deviations, got {n}")
        self.n = n

    def bounds(self, shape: Shape, bits: int) -> tuple[float, float]:
        mean, std = shape.moments.mean, shape.moments.var.sqrt()
        return float((mean - self.n * std).min()), float((mean + self.n * std).max())


class OptimalClipping(AnalyticRange):
    """The range of least squared error for a normal or Laplace tensor (ACIQ), by its published constants.

    All channels together are taken as one tensor with one mean and deviation. Where a ReLU follows, only half of the
    range is used, so the constant is that of one bit more. Above 8 bits the constants of 8 bits grow with the logarithm
    of the number of levels, as the others do.

    Args:
        distribution: "gauss" or "laplace".
    """

    def __init__(self, distribution: Literal["gauss", "laplace"] = "gauss") -> None:
        if distribution not in ("gauss", "laplace"):
            raise ValueError(f"calibration.rule.distribution: expected 'gauss' or 'laplace', got {distribution!r}")
        self.distribution = distribution

    def bounds(self, shape: Shape, bits: int) -> tuple[float, float]:
        mean = shape.moments.mean.mean()
        var = (shape.moments.var + (shape.moments.mean - mean).square()).mean()
        constants = GAUSS if self.distribution == "gauss" else LAPLACE
        scale = var.sqrt() if self.distribution == "gauss" else (var / 2).sqrt()
        asked = bits + (shape.low >= 0)
        top = min(asked, 8)
        alpha = float(scale) * (constants[top] + (asked - top) * (constants[8] - constants[7]))
        return float(mean) - alpha, float(mean) + alpha


@torch.no_grad()
def set_analytic_ranges(conversion: Conversion, *, rule: AnalyticRange, stored: bool = True) -> None:
    """Set the range of every activation quantizer of the student without any image.

    The images are taken as N(0, 1), which normalised ones are about.

    Args:
        conversion: the student, its float reference, and what the folded BatchNorm layers stored, where there were any.
        rule: from moments to a range.
        stored: whether BatchNorm's stored statistics are used; without, all is propagated from the images.

    Raises:
        ValueError: for a tensor or an operator whose moments cannot be known.
    """
    moments = reference_moments(conversion, stored=stored)
    nodes = {node.name: node for node in conversion.reference.graph.nodes}
    operators = Operators(conversion.reference)
    quantized = {f"{n.target}": str(n.meta["tensor"]) for n in conversion.student.graph.nodes if "tensor" in n.meta}
    for path, site in sites(conversion.student):
        name = quantized.get(path)
        if name is None or name not in nodes:
            raise ValueError(
                f"{path}: expected a tensor of the traced network, got one inside a module that cannot be traced; its "
                "range is not known without images. Calibrate on calibration=noise or synthetic images instead"
            )
        _set(site, _shape(nodes[name], operators, moments), rule)


def reference_moments(conversion: Conversion, *, stored: bool = True, skip_unknown: bool = False) -> dict[str, Moments]:
    """Return the moments (C,) of every tensor of the float reference by node name, for images that are N(0, 1).

    `skip_unknown`: leave out tensors whose moments cannot be known.
    """
    prior = Moments(torch.zeros(()), torch.ones(()))
    norms = conversion.norms if stored else {}
    found = propagate_graph(conversion.reference, prior, stored=stored, norms=norms, skip_unknown=skip_unknown)
    return {node.name: moments for node, moments in found.items()}


def _shape(node: fx.Node, operators: Operators, moments: dict[str, Moments]) -> Shape:
    low, high = CLIPPED.get(operators.name(node), (-math.inf, math.inf))
    if math.isfinite(low):
        return Shape(moments[node.all_input_nodes[0].name], low, high)
    return Shape(moments[node.name], 0.0 if operators.non_negative(node) else low, high)


def _set(site: ActivationSite, shape: Shape, rule: AnalyticRange) -> None:
    quantizer = site.quantizer
    low, high = rule.bounds(shape, quantizer.grid.bits)
    low, high = (min(max(value, shape.low), shape.high) for value in (low, high))
    device = quantizer.scale.device
    scale, zero_point = from_bounds(
        torch.tensor([low], device=device), torch.tensor([high], device=device), quantizer.grid
    )
    quantizer.set_range(scale.squeeze(0), zero_point.squeeze(0))
