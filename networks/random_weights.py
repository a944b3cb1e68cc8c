"""Untrained networks that still behave: BatchNorm statistics that belong to the activations, none of them trivial."""

from __future__ import annotations

import torch
from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BATCH = 8
AFFINE_SPREAD = 0.2  # standard deviation of the BatchNorm scale around 1 and of its shift around 0


@torch.no_grad()
def settle(network: nn.Module, input_size: tuple[int, int, int], seed: int = 0) -> nn.Module:
    """Draw BatchNorm scales and shifts and fill the running statistics from one batch of N(0, 1) images, in place.

    A network without BatchNorm stays as it is.

    After this the running means and variances are those of the network's own activations, so every layer works in
    a sane range, as after training; folding, alignment and calibration have something real to work on.

    Args:
        network: any network; only its BatchNorm layers change.
        input_size: (C, H, W).
        seed: of the scales, the shifts and the images.

    Returns:
        The same network, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        return network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if norm.affine:
            norm.weight.normal_(1.0, AFFINE_SPREAD, generator=generator).abs_()
            norm.bias.normal_(0.0, AFFINE_SPREAD, generator=generator)
        norm.momentum = 1.0  # the running statistics become those of this batch
    network.train()
    network(torch.randn(BATCH, *input_size, generator=generator))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()
