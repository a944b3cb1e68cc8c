"""The plan of a reconstruction: which unit is learned when, from which images, at which learning rate.

Everything here is a function of the seed and of integers, so that a run can be resumed anywhere with equal numbers.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["joint", "weights", "activations"]


@dataclass(frozen=True)
class Epoch:
    """One epoch of the Trainer: `unit` (its index) is learned for `iterations` steps in `phase`.

    Raises:
        ValueError: without a step.
    """

    phase: Phase
    unit: int
    iterations: int

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(
                f"iterations: expected at least 1 step for the phase {self.phase!r}, got {self.iterations}; "
                "use reconstruction=none to learn nothing"
            )


def seed_of(*parts: int | str) -> int:
    """A seed for `torch.Generator` that depends on all parts; unlike `hash`, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def index_batches(
    count: int, batch_size: int, iterations: int, *, seed: int, process: int = 0, processes: int = 1
) -> Tensor:
    """The images of every step: random permutations of `count` images one after the other, cut into equal batches.

    Every batch has exactly `batch_size` entries and no image is left out, also where `batch_size` does not divide
    `count` or exceeds it.

    Returns:
        (iterations, batch_size / processes) int64: the share of `process`.

    Raises:
        ValueError: if a size is not positive, or the processes cannot share the batch equally.
    """
    if batch_size % processes:
        raise ValueError(f"batch_size: expected a multiple of the {processes} processes, got {batch_size}")
    for name, value in (("count", count), ("batch_size", batch_size), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(iterations * batch_size / count)
    order = torch.rand(passes, count, generator=generator).argsort(dim=1)  # a permutation in each row
    return order.flatten()[: iterations * batch_size].view(iterations, batch_size)[:, process::processes]


def anneal(kind: str, step: int, steps: int) -> float:
    """Factor on the learning rate at `step` of `steps`: "constant", or "cosine" or "linear" from 1 towards 0.

    Raises:
        ValueError: if `kind` is none of these.
    """
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * step / steps))
    if kind == "linear":
        return 1.0 - step / steps
    raise ValueError(f"anneal: expected 'constant', 'cosine' or 'linear', got {kind!r}")


def held_out(count: int, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """(images to learn from, images held out), both sorted; at least one image is learned from.

    Raises:
        ValueError: if `share` is outside [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"holdout: expected a share of the images from 0 to below 1, got {share}")
    kept = max(1, count - round(count * share))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[:kept].sort().values, order[kept:].sort().values
