"""One optimiser and one schedule for all units, learned one after the other."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from reconstruction.learnables import Learnables
from reconstruction.schedules import Epoch, Phase, anneal

LARGEST_RAISE = 50.0
OPTION_OF = {"bias": "reconstruction.bias_lr", "rounding": "weight", "weight": "weight"}  # by a group's kind
OPTIONS = ("betas", "eps", "bounds")  # what a quantizer's group may state besides its rate


@dataclass
class Slot:
    """One group of the optimiser: the parameters of all units that share its `options`, and a rate for each epoch."""

    options: dict[str, Any]
    parameters: list[nn.Parameter] = field(default_factory=list)
    rates: dict[int, tuple[float, str]] = field(default_factory=dict)  # epoch -> (lr, anneal)


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
    time for each group, also for those without gradients, so there are only as many as the largest unit has. Groups
    with other `betas`, `eps` or `bounds` are counted apart. After each step parameters are projected onto the `bounds`
    of their group.

    Args:
        epochs: in the order in which they are trained; the schedule counts optimiser steps.
        learnables: of each unit.
        rates_stated_for: the steps of the longest phase that the learning rates are meant for, but for groups that
            say so themselves (`stated_for`). With fewer steps they are raised in proportion, at most `LARGEST_RAISE`
            times, so that parameters can go as far; None: as stated. Groups with `over_steps` state theirs for any
            number.
    """
    slots: list[Slot] = []
    # by the longest phase: a shorter second one is short as published too, and its rate is stated for that
    longest = max((epoch.iterations for epoch in epochs), default=1)
    for k, epoch in enumerate(epochs):
        for group in learnables[epoch.unit].groups(epoch.phase):
            slot = _free_slot(slots, k, {name: group[name] for name in OPTIONS if name in group})
            slot.parameters.extend(group["params"])
            slot.rates[k] = (_factor(group, epoch, rates_stated_for, longest) * group["lr"], group["anneal"])
    ends = list(accumulate(epoch.iterations for epoch in epochs))

    def rate(slot: Slot, step: int) -> float:
        k = bisect_right(ends, step)
        if k not in slot.rates:
            return 0.0
        lr, kind = slot.rates[k]
        iterations = epochs[k].iterations
        return lr * anneal(kind, step - ends[k] + iterations, iterations)

    optimizer = torch.optim.Adam([{"params": slot.parameters, "lr": 1.0, **slot.options} for slot in slots])
    if any("bounds" in slot.options for slot in slots):
        optimizer.register_step_post_hook(_project)
    return optimizer, LambdaLR(optimizer, [lambda step, slot=slot: rate(slot, step) for slot in slots])


def expect_rates(learnables: Sequence[Learnables], rates_stated_for: int | None = None) -> None:
    """Refuse rates that no optimiser takes: Adam sees those of its schedule only, and not before the first step.

    Raises:
        ValueError: if a group's `lr` is negative or not finite, or rates are stated for less than a step.
    """
    if rates_stated_for is not None and rates_stated_for < 1:
        raise ValueError(f"rates_stated_for: expected at least 1 step, or null, got {rates_stated_for}")
    for part in learnables:
        for group in part.groups("joint"):
            option = OPTION_OF.get(group["kind"], "weight or activation")
            if not 0.0 <= group["lr"] < math.inf:
                raise ValueError(
                    f"lr: expected finite learning rates of at least 0, got {group['lr']} for parameters of kind "
                    f"{group['kind']!r}; see {option}"
                )
            if group.get("stated_for") is not None and group["stated_for"] < 1:
                raise ValueError(
                    f"stated_for: expected at least 1 step, or null, got {group['stated_for']}; see {option}"
                )


def _factor(group: dict[str, Any], epoch: Epoch, rates_stated_for: int | None, longest: int) -> float:
    """What the rate that a group states is multiplied by in this epoch."""
    if group.get("over_steps"):
        return 1 / epoch.iterations
    stated_for = group.get("stated_for") or rates_stated_for
    return 1.0 if stated_for is None else min(LARGEST_RAISE, max(1.0, stated_for / longest))


def _free_slot(slots: list[Slot], epoch: int, options: dict[str, Any]) -> Slot:
    """The first slot with these options that this epoch does not use yet, or a new one behind the others."""
    for slot in slots:
        if slot.options == options and epoch not in slot.rates:
            return slot
    slots.append(Slot(options))
    return slots[-1]


@torch.no_grad()
def _project(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Put every parameter that has just moved back between the bounds of its group."""
    for group in optimizer.param_groups:
        if "bounds" in group:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.clamp_(*group["bounds"])
