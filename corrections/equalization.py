"""Cross-layer equalization: factors move between consecutive layers until their channels have equal ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (DFQ), ICCV 2019, arXiv
1906.04721, sections 4.1 and 4.1.3: with r1_i = max |W1[i]| and r2_i = max |W2[:, i]|,

    s_i = sqrt(r1_i r2_i) / r1_i,   W1[i] *= s_i,   b1_i *= s_i,   W2[:, i] /= s_i        (s here is 1 / s of the paper)

over all pairs until nothing moves. It leaves the float function as it is, up to rounding. Absorbing biases does so only
approximately: where an activation lies below c = max(0, beta - 3 gamma), one time in 740 for a normal one, and at
padded borders, the result changes. Replacing ReLU6 by ReLU changes it wherever the bound was met.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corrections.base import Facts, GraphCorrection
from corrections.layers import bias_of, float_layer
from corrections.pairs import Pair, by_input, find_pairs, to_relu
from quantizers.layer import output_first, own_layout
from quantizers.operators import Operators
from quantizers.trace import StoredNorm, Trace

SMALLEST = 1e-6  # ranges below this share of the layer's largest are those of dead channels, which stay as they are


class Equalization(GraphCorrection):
    """Equalizes the ranges of weights over all pairs of layers with a homogeneous function between.

    Needed where a whole weight has one scale, and in depthwise networks; per-channel scales take up the first layer's
    differences themselves.

    Args:
        replace_relu6: take ReLU6 for ReLU where it stands between two layers, as DFQ does; without, it ends a pair.
        tolerance: sweeps end when no factor differs from 1 by more.
        sweeps: at most that many over all pairs.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, *, replace_relu6: bool = False, tolerance: float = 1e-3, sweeps: int = 100) -> None:
        if tolerance <= 0 or sweeps < 1:
            raise ValueError(f"tolerance, sweeps: expected positive numbers, got {tolerance} and {sweeps}")
        self.replace_relu6, self.tolerance, self.sweeps = replace_relu6, tolerance, sweeps

    @torch.no_grad()
    def prepare(self, traced: Trace) -> Facts:
        pairs = find_pairs(traced, through_relu6=self.replace_relu6)
        replaced = {node for pair in pairs for node in pair.bounded}
        for node in replaced:
            to_relu(node)
        layers = {n: traced.graph_module.get_submodule(str(n.target)) for p in pairs for n in (p.first, p.second)}
        weights = {node: output_first(layer).double() for node, layer in layers.items()}
        total: dict[str, Tensor] = {}
        sweeps, change = 0, float("inf")
        while change > self.tolerance and sweeps < self.sweeps:
            sweeps, change = sweeps + 1, 0.0
            for pair in pairs:
                factor = _factor(pair, layers, weights)
                _move(pair, factor, layers, weights)
                path = str(pair.first.target)
                total[path] = total.get(path, 1.0) * factor
                change = max(change, float((factor - 1).abs().max()))
        for node, layer in layers.items():
            float_layer(layer).weight.copy_(own_layout(layer, weights[node]))
        for path, factor in total.items():
            _scale_output(traced, path, factor)
        traced.graph_module.recompile()
        names = [[str(pair.first.target), str(pair.second.target)] for pair in pairs]
        return {"pairs": names, "sweeps": sweeps, "last_change": change, "replaced_relu6": len(replaced)}


class BiasAbsorption(GraphCorrection):
    """Moves c = max(0, beta - 3 gamma) of each channel past a ReLU into the next layer's bias, so that ranges shrink.

    Args:
        deviations: of the stored output that stay above zero; 3 in DFQ.

    Raises:
        ValueError: if it is negative.
    """

    def __init__(self, *, deviations: float = 3.0) -> None:
        if deviations < 0:
            raise ValueError(f"deviations: expected a number from 0, got {deviations}; DFQ uses 3")
        self.deviations = deviations

    @torch.no_grad()
    def prepare(self, traced: Trace) -> Facts:
        operators, absorbed, skipped = Operators(traced.graph_module, traced.opaque), 0, []
        for pair in find_pairs(traced):
            path = str(pair.first.target)
            if [operators.name(node) for node in pair.between] != ["relu"]:
                continue
            if path not in traced.norms:
                skipped.append(path)  # nothing is known of its output
                continue
            absorbed += self._absorb(pair, traced)
        return {"channels": absorbed, "skipped": skipped}

    def _absorb(self, pair: Pair, traced: Trace) -> int:
        first, second = (traced.graph_module.get_submodule(str(n.target)) for n in (pair.first, pair.second))
        beta, gamma = traced.norms[str(pair.first.target)]
        weight = by_input(second, output_first(second).double()).sum(3)  # (G, O, I)
        share = (beta - self.deviations * gamma).clamp(min=0.0).to(weight)  # c, (C,)
        bias_of(first).sub_(share)
        bias_of(second).add_((weight * share.view(len(weight), 1, -1)).sum(2).flatten())
        traced.norms[str(pair.first.target)] = StoredNorm((beta - share.to(beta)), gamma)
        return int((share > 0).sum())


def _factor(pair: Pair, layers: dict, weights: dict) -> Tensor:
    """s, (C,); 1 for a channel that is dead on either side."""
    r1 = weights[pair.first].flatten(1).abs().amax(1)
    r2 = by_input(layers[pair.second], weights[pair.second]).abs().amax((1, 3)).flatten()
    alive = (r1 > SMALLEST * r1.max()) & (r2 > SMALLEST * r2.max())
    return torch.where(alive, (r2 / torch.where(alive, r1, 1.0)).sqrt(), 1.0)


def _move(pair: Pair, factor: Tensor, layers: dict, weights: dict) -> None:
    weights[pair.first] = weights[pair.first] * factor.view(-1, *(1,) * (weights[pair.first].dim() - 1))
    second, weight = layers[pair.second], weights[pair.second]
    grouped = by_input(second, weight)
    weights[pair.second] = (grouped / factor.view(len(grouped), 1, -1, 1)).reshape(weight.shape)


def _scale_output(traced: Trace, path: str, factor: Tensor) -> None:
    """Bias and stored statistics follow the weight."""
    layer = float_layer(traced.graph_module.get_submodule(path))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() * factor)
    if path in traced.norms:
        traced.norms[path] = StoredNorm(*(t * factor.to(t) for t in traced.norms[path]))
