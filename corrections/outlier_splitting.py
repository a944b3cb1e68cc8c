"""Outlier channel splitting: input channels with outlying weights are read twice, each time with half the weight.

Zhao et al., "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting" (OCS), ICML
2019, arXiv 1901.09504: W x = W[:, c] / 2 x_c + W[:, c] / 2 x_c + ... is exact, and the range of the weights shrinks. We
look for the largest absolute weight, where the released code takes the largest signed one. Halves are equal; the
paper's variant that splits into unequal ones so that their roundings cancel needs the grid, not chosen yet here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from corrections.base import Facts, GraphCorrection
from corrections.layers import own_layers
from quantizers.channel_gather import ChannelGather
from quantizers.layer import TRANSPOSED
from quantizers.trace import Trace

GATHERS = "channel_gathers"  # they stand in the network at channel_gathers.<node name>


class OutlierSplitting(GraphCorrection):
    """Splits the channels with the largest weights until each layer has `expand_ratio` more of them.

    A gather of channels is put before the layer, so whoever else reads the tensor is not touched, and activations stay
    quantized where the protocol says. Grouped convolutions cannot be widened by single channels, and layers that read
    the image or run twice are left alone too; the facts name them.

    Args:
        expand_ratio: share of channels added, rounded up to a whole channel; 0.02 in the paper.

    Raises:
        ValueError: if it is outside (0, 1].
    """

    def __init__(self, *, expand_ratio: float = 0.02) -> None:
        if not 0 < expand_ratio <= 1:
            raise ValueError(f"expand_ratio: expected a share of the channels in (0, 1], got {expand_ratio}")
        self.expand_ratio = expand_ratio

    @torch.no_grad()
    def prepare(self, traced: Trace) -> Facts:
        added: dict[str, int] = {}
        skipped: list[str] = []
        for path, node in own_layers(traced.graph_module).items():
            layer: Any = traced.graph_module.get_submodule(path)
            source = node.all_input_nodes[0]
            if path in traced.opaque or getattr(layer, "groups", 1) > 1 or source.op == "placeholder":
                skipped.append(path)
                continue
            added[path] = self._split(traced.graph_module, node, layer)
        traced.graph_module.graph.lint()
        traced.graph_module.recompile()
        return {"added_channels": added, "skipped": skipped}

    def _split(self, graph_module: fx.GraphModule, node: fx.Node, layer: Any) -> int:
        axis = 0 if isinstance(layer, TRANSPOSED) else 1
        weight, index = split_channels(layer.weight, axis, self.expand_ratio)
        count = len(index) - layer.weight.shape[axis]
        layer.weight = nn.Parameter(weight, requires_grad=False)
        linear = isinstance(layer, nn.Linear)
        setattr(layer, "in_features" if linear else "in_channels", len(index))
        source = node.all_input_nodes[0]
        gather = ChannelGather(index.to(weight.device), -1 if linear else 1)
        graph_module.add_submodule(f"{GATHERS}.{node.name}", gather)
        with graph_module.graph.inserting_before(node):
            inserted = graph_module.graph.call_module(f"{GATHERS}.{node.name}", (source,))
        shape = list(source.meta["shape"])
        shape[gather.axis] = len(index)
        inserted.meta = {"scope": node.meta["scope"], "is_tensor": True, "shape": tuple(shape)}
        node.replace_input_with(source, inserted)
        return count


def split_channels(weight: Tensor, axis: int, expand_ratio: float) -> tuple[Tensor, Tensor]:
    """The wider weight, and which original channel each of its channels along `axis` reads.

    One after the other the channel with the largest absolute weight, halves included, is halved and doubled.
    """
    channels = weight.shape[axis]
    index = torch.arange(channels, device=weight.device)
    largest = weight.detach().movedim(axis, 0).flatten(1).abs().amax(1)
    share = torch.ones_like(largest)
    for _ in range(math.ceil(expand_ratio * channels)):
        worst = largest.argmax()
        largest[worst] /= 2
        share[worst] /= 2
        index, largest, share = (torch.cat([t, t[worst, None]]) for t in (index, largest, share))
    shape = [-1 if i == axis else 1 for i in range(weight.dim())]
    return weight.index_select(axis, index) * share.view(shape), index
