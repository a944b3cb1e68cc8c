"""Channels picked by their numbers, some of them more than once: what a layer with split channels reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelGather(nn.Module):
    """x[..., index, ...] along `axis`, so that a channel can be read twice.

    Args:
        index: (C',) int64, numbers of channels.
        axis: where the channels are, 1 for feature maps, -1 for features of a linear layer.
    """

    index: Tensor

    def __init__(self, index: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:  # (N, C, *) -> (N, C', *)
        return torch.index_select(x, self.axis, self.index)
