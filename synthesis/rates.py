"""Learning rates of a synthesis: one rule for all parameter groups, or one for each.

torch's own schedulers treat all groups alike, while GENIE lowers the rate of latents on a plateau and that of its
generator exponentially. Everything is a function of the step and, on a plateau, of the losses so far.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from synthesis.stages import Stages


class Rate(ABC):
    """A factor for the learning rate. What it keeps between steps stands in `state`, plain numbers only."""

    reads_loss = False

    def __init__(self) -> None:
        self.state: dict[str, float] = {}

    def plan(self, steps: int) -> None:  # noqa: B027  most rates do not ask
        """Learn how many steps a batch of images takes, before the first."""

    @abstractmethod
    def factor(self, step: int, loss: float, lr: float) -> float:
        """Return the factor after `step` steps.

        Args:
            step: how many are done.
            loss: of the last of them; NaN where the rate does not read it.
            lr: the group's first rate.
        """


class Constant(Rate):
    """The learning rate stays as it is."""

    def factor(self, step: int, loss: float, lr: float) -> float:
        return 1.0


class Exponential(Rate):
    """Multiply by `factor` after every `every` steps."""

    def __init__(self, by: float = 0.95, every: int = 100) -> None:
        super().__init__()
        self.by = by
        self.every = every

    def factor(self, step: int, loss: float, lr: float) -> float:
        return self.by ** (step // self.every)


class Staircase(Rate):
    """Multiply by `by` at the end of each stage (GDFQ: at a quarter, half and three quarters).

    Args:
        shares: length of each stage, in proportion; see `Stages`.
        by: factor between one stage and the next.
    """

    def __init__(self, shares: Sequence[int], by: float = 0.1) -> None:
        super().__init__()
        self.stages = Stages(shares)
        self.by = by

    def plan(self, steps: int) -> None:
        self.stages.plan(steps)

    def factor(self, step: int, loss: float, lr: float) -> float:
        return self.by ** min(self.stages.index(step), len(self.stages.shares) - 1)


class Plateau(Rate):
    """Multiply by 0.1 when the loss has not fallen by a ten-thousandth for more than `patience` steps.

    The same rule as `torch.optim.lr_scheduler.ReduceLROnPlateau`, with its defaults.

    Args:
        patience: steps without improvement.
        min_lr: the learning rate never falls below.
    """

    reads_loss = True

    def __init__(self, patience: int = 100, min_lr: float = 1e-4) -> None:
        super().__init__()
        self.patience = patience
        self.min_lr = min_lr
        self.state = {"best": math.inf, "bad": 0, "factor": 1.0}

    def factor(self, step: int, loss: float, lr: float) -> float:
        if step == 0:
            return 1.0
        state = self.state
        if loss < state["best"] * (1 - 1e-4):
            state["best"], state["bad"] = loss, 0
        else:
            state["bad"] += 1
        if state["bad"] > self.patience:
            lower = max(lr * state["factor"] * 0.1, self.min_lr)
            if lr * state["factor"] - lower > 1e-8:
                state["factor"] = lower / lr
            state["bad"] = 0
        return state["factor"]


class WarmCosine(Rate):
    """Linear warm-up, then half a cosine to zero; once for each stage, one after the other.

    Args:
        shares: length of each stage, one for each resolution, in proportion; see `Stages`.
        warmup: steps, out of the sum of `shares`, of the linear rise at the beginning of each stage.
    """

    def __init__(self, shares: Sequence[int], warmup: int = 100) -> None:
        super().__init__()
        self.stages = Stages(shares)
        self.warmup = warmup

    def plan(self, steps: int) -> None:
        self.stages.plan(steps)

    def factor(self, step: int, loss: float, lr: float) -> float:
        stage = self.stages.index(step)
        if stage == len(self.stages.shares):
            return 0.0
        start, end = self.stages.starts[stage], self.stages.ends[stage]
        step, length = step - start, end - start
        warmup = min(self.stages.scaled(self.warmup), length)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(length - warmup, 1)))


class Rates:
    """A scheduler: one `Rate` for all groups of an optimizer, or as many as there are groups.

    Args:
        optimizer: its groups' present rates are those that factors multiply.
        rates: in the order of the groups.

    Raises:
        ValueError: if there are neither one nor as many rates as groups.
    """

    def __init__(self, optimizer: Optimizer, *, rates: Sequence[Rate]) -> None:
        groups = optimizer.param_groups
        if len(rates) not in (1, len(groups)):
            raise ValueError(f"schedule.rates: expected 1 or {len(groups)}, one a parameter group, got {len(rates)}")
        self.optimizer = optimizer
        self.rates = copy.deepcopy(list(rates))  # a second optimizer starts anew
        self.base = [float(group["lr"]) for group in groups]
        self.steps = 0
        self.reads_loss = any(rate.reads_loss for rate in self.rates)
        self._set(math.inf)

    def plan(self, steps: int) -> None:
        """Learn how many steps a batch of images takes, before the first."""
        for rate in self.rates:
            rate.plan(steps)
        self._set(math.inf)

    def step(self, loss: float) -> None:
        """Advance by one step whose loss was `loss`, which only rates that `reads_loss` look at."""
        self.steps += 1
        self._set(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes from step to step, and the rates it multiplies."""
        return {"steps": self.steps, "base": list(self.base), "rates": [dict(rate.state) for rate in self.rates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; the learning rates themselves belong to the optimizer's own state."""
        self.steps, self.base = state["steps"], list(state["base"])
        for rate, kept in zip(self.rates, state["rates"], strict=True):
            rate.state = dict(kept)

    def _set(self, loss: float) -> None:
        if len(self.rates) == 1:
            factors = [self.rates[0].factor(self.steps, loss, self.base[0])] * len(self.base)
        else:
            factors = [r.factor(self.steps, loss, lr) for r, lr in zip(self.rates, self.base, strict=True)]
        for group, lr, factor in zip(self.optimizer.param_groups, self.base, factors, strict=True):
            group["lr"] = lr * factor
