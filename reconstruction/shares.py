"""Shares of a parallel reconstruction: units that do not depend on each other are learned by several processes.

The parallel schedule of Hubara et al. (AdaQuant), arXiv 2006.10518. Everything that is drawn depends on the seed, the
phase, the unit and the step, so shares put together are bit by bit what one process learns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reconstruction.learnables import Learnables
from reconstruction.schedules import Epoch


def units_of_share(epochs: Sequence[Epoch], share: tuple[int, int]) -> list[int]:
    """The units, by index, that belong to share `(i, n)`: of those with something to learn every n-th from the i-th on.

    Raises:
        ValueError: unless `0 <= i < n`.
    """
    index, count = share
    if not 0 <= index < count:
        raise ValueError(f"share: expected (i, n) with 0 <= i < n, got {tuple(share)}")
    return sorted({epoch.unit for epoch in epochs})[index::count]


def epochs_of_share(
    epochs: Sequence[Epoch], learnables: Sequence[Learnables], share: tuple[int, int], *, parallel: bool
) -> list[Epoch]:
    """The epochs of a share's units, in their order; all of them for the share (0, 1).

    Raises:
        ValueError: if the share does not exist, or there are several although units depend on each other: because of
            the schedule, or because a layer runs in more than one of them.
    """
    own = units_of_share(epochs, share)
    if share[1] > 1:
        if not parallel:
            raise ValueError(
                f"share: expected (0, 1) with schedule=sequential, got {tuple(share)}; a unit there needs the units "
                "before it. Use schedule=parallel"
            )
        seen: set[Tensor] = set()
        for part in learnables:
            tensors = set(part.tensors())
            if tensors & seen:
                raise ValueError(
                    f"share: expected (0, 1) for a network that runs a layer in several units, got {tuple(share)}"
                )
            seen |= tensors
    return [epoch for epoch in epochs if epoch.unit in own]


def pack(learnables: Sequence[Learnables], units: Sequence[int]) -> Tensor:
    """All that learning has changed in `units`, as bytes: (B,) uint8 on the CPU."""
    tensors = (tensor for unit in units for tensor in learnables[unit].tensors())
    parts = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


def unpack(packed: Tensor, learnables: Sequence[Learnables], units: Sequence[int]) -> None:
    """Write what `pack` returned into the same units of an equal student.

    Raises:
        ValueError: if the number of bytes is another.
    """
    states = [(learnables[unit], learnables[unit].tensors()) for unit in units]
    expected = sum(tensor.numel() * tensor.element_size() for _, tensors in states for tensor in tensors)
    if packed.numel() != expected:
        raise ValueError(f"packed: expected {expected} bytes for {len(units)} units, got {packed.numel()}")
    start = 0
    for part, tensors in states:
        values = []
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            values.append(packed[start : start + size].clone().view(tensor.dtype).view(tensor.shape))
            start += size
        part.restore(values)
