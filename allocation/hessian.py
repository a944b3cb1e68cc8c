"""The trace of the Hessian with respect to each layer's weights, estimated with random signs.

Hutchinson's estimate as in HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852): the mean of v' H v over v of random
signs. One v for all layers at once: terms between layers have mean zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def average_traces(
    network: nn.Module, layers: Sequence[str], images: Tensor, *, batch_size: int, probes: int, seed: int
) -> dict[str, Tensor]:
    """Estimates (probes,) of each layer's trace divided by its number of weights.

    The loss is KL(p || network) in nats, mean over images, where p are the network's own predictions as constants: its
    gradient is zero here, and its Hessian the Fisher information.

    Args:
        network: float.
        layers: paths of layers with a weight.
        images: (N, C, H, W).
        batch_size: images at a time.
        probes: random vectors.
        seed: of these.
    """
    device = next((t.device for t in (*network.parameters(), *network.buffers())), images.device)
    names = [f"{layer}.weight" for layer in layers]
    leaves = {name: network.get_parameter(name).detach().clone().requires_grad_(True) for name in names}
    rng = torch.Generator().manual_seed(seed)
    signs = [
        [torch.randint(0, 2, leaf.shape, generator=rng).float().mul_(2).sub_(1).to(device) for leaf in leaves.values()]
        for _ in range(probes)
    ]
    found = torch.zeros(len(layers), probes, dtype=torch.float64)
    with torch.enable_grad():
        for batch in images.split(batch_size):
            outputs = torch.func.functional_call(network, leaves, (batch.to(device),))
            own = outputs.detach().log_softmax(1)
            loss = F.kl_div(outputs.log_softmax(1), own, reduction="sum", log_target=True) / len(images)
            slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            for i, vectors in enumerate(signs):
                products = torch.autograd.grad(slopes, list(leaves.values()), vectors, retain_graph=True)
                found[:, i] += (
                    torch.stack([(p * v).sum() for p, v in zip(products, vectors, strict=True)]).double().cpu()
                )
    return {
        layer: (found[i] / leaves[name].numel()).float()
        for i, (layer, name) in enumerate(zip(layers, names, strict=True))
    }
