"""Teachers as deployed networks come: BatchNorm multiplied into the convolutions, nothing left of what it stored.

The affine map of BatchNorm at inference joins the convolution before it (Jacob et al., CVPR 2018, arXiv 1712.05877,
section 3.2), with torch's own arithmetic. A normalisation that follows no convolution stays.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

PAIRS = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))


def fold_batch_norm(network: nn.Module) -> fx.GraphModule:
    """A copy of a network in eval mode whose convolutions have taken in the BatchNorm behind them; same module paths.

    Raises:
        ValueError: if the network is in training mode, or torch.fx cannot trace it.
    """
    if network.training:
        raise ValueError(
            "network: expected eval mode, in which BatchNorm is an affine map, got training mode; call network.eval()"
        )
    network = copy.deepcopy(network)
    try:
        traced = fx.symbolic_trace(network)
    except Exception as error:  # whatever the network's own code raises on a symbolic image
        raise ValueError(
            f"model.fold_batch_norm: expected a network that torch.fx can trace, got {type(network).__name__} "
            f"({type(error).__name__}: {error}); use model.fold_batch_norm=false"
        ) from error
    calls = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not node.args:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        conv: Any = traced.get_submodule(str(source.target))
        norm: Any = traced.get_submodule(str(node.target))
        # a layer that runs twice, or whose output others read as well, has a use without this normalisation
        alone = len(source.users) == 1 and calls[str(source.target)] == 1
        if alone and _is_pair(conv, norm):
            traced.set_submodule(str(source.target), fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(source)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


def _is_pair(conv: nn.Module, norm: Any) -> bool:
    return (type(conv), type(norm)) in PAIRS and norm.running_mean is not None
