"""Choosing some images out of many: evenly over the list, or at random with equal shares of the classes."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced(available: int, limit: int | None) -> Tensor:
    """Indices of `limit` of `available` images, equally far apart, so that a list sorted by class keeps its classes.

    Returns:
        (min(limit, available),) int64, increasing.

    Raises:
        ValueError: if the limit is below one.
    """
    if limit is None or limit >= available:
        return torch.arange(available)
    if limit < 1:
        raise ValueError(f"data.limit: expected at least 1 or null, got {limit}")
    return torch.arange(limit) * available // limit


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """A random choice in which the classes differ by at most one image, as long as each has enough.

    The classes take turns, so the choice of a smaller count with the same seed is a prefix of a larger one.

    Args:
        labels: (N,) class of every available image.
        count: how many to choose.
        seed: of the choice.

    Returns:
        (count,) int64 indices in the order of choice.

    Raises:
        ValueError: if more are asked for than there are.
    """
    available = len(labels)
    if not 1 <= count <= available:
        raise ValueError(f"calibration.count: expected 1 to {available} (all there are), got {count}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(available, generator=generator)
    classes, members = torch.unique(labels[shuffled], return_inverse=True)
    turn = torch.empty(available, dtype=torch.int64)  # the how-manieth of its class each image is
    for index in range(len(classes)):
        chosen = members == index
        turn[chosen] = torch.arange(int(chosen.sum()))
    place = torch.randperm(len(classes), generator=generator)  # order of the classes within a turn
    order = torch.argsort(turn * len(classes) + place[members])
    return shuffled[order[:count]]
