"""One optimiser and one schedule for all units, learned one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from reconstruction.learnables import Learnables
from reconstruction.schedules import Epoch, Phase, anneal

LARGEST_RAISE = 50.0


def plan(iterations: Sequence[tuple[Phase, int]], learnables: Sequence[Learnables]) -> list[Epoch]:
    """Phase by phase, an epoch for every unit that has something to learn in it."""
    return [
        Epoch(phase, unit, steps)
        for phase, steps in iterations
        for unit, part in enumerate(learnables)
        if part.groups(phase)
    ]


def adam_for_all(
    epochs: Sequence[Epoch], learnables: Sequence[Learnables], *, rates_stated_for: int | None = None
) -> tuple[torch.optim.Adam, LambdaLR]:
    """One Adam whose numbers are those of a fresh Adam, with a schedule of its own, for every epoch.

    Adam counts steps per parameter and skips parameters without gradient, so each unit starts afresh. Group j of the
    optimiser holds the j-th group of every unit, and its rate is that of the unit in work: an optimiser step costs
    time for each group, also for those without gradients, so there are only as many as the largest unit has.

    Args:
        epochs: in the order in which they are trained; the schedule counts optimiser steps.
        learnables: of each unit.
        rates_stated_for: the number of steps that the quantizers' learning rates are meant for. With fewer steps they
            are raised in proportion, at most `LARGEST_RAISE` times, so that parameters can go as far; None: as stated.
    """
    slots: list[list[nn.Parameter]] = []
    rates: list[list[tuple[float, str]]] = []  # [epoch][slot]
    for epoch in epochs:
        groups = learnables[epoch.unit].groups(epoch.phase)
        slots += [[] for _ in range(len(groups) - len(slots))]
        for slot, group in zip(slots, groups, strict=False):
            slot.extend(group["params"])
        raised = 1.0 if rates_stated_for is None else min(LARGEST_RAISE, max(1.0, rates_stated_for / epoch.iterations))
        rates.append([(raised * group["lr"], group["anneal"]) for group in groups])
    ends = list(accumulate(epoch.iterations for epoch in epochs))

    def rate(slot: int, step: int) -> float:
        k = bisect_right(ends, step)
        if k == len(ends) or slot >= len(rates[k]):
            return 0.0
        lr, kind = rates[k][slot]
        iterations = epochs[k].iterations
        return lr * anneal(kind, step - ends[k] + iterations, iterations)

    optimizer = torch.optim.Adam([{"params": slot, "lr": 1.0} for slot in slots])
    return optimizer, LambdaLR(optimizer, [lambda step, slot=slot: rate(slot, step) for slot in range(len(slots))])
