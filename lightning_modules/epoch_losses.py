"""Mean losses of generator and student, an epoch at a time, kept where a checkpoint finds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.turns import Turns

GENERATOR, STUDENT = 0, 1


class EpochLosses(nn.Module):
    """Sums on the device, so that no step waits for it; the student's first and least mean, once an epoch is closed."""

    sums: Tensor  # over the present epoch: of the generator, of the student
    first: Tensor
    best: Tensor  # least mean loss of the student in an epoch, and that epoch

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2))
        self.register_buffer("first", torch.tensor(torch.inf))
        self.register_buffer("best", torch.tensor([torch.inf, -1.0]))

    def open(self) -> None:
        """Begin an epoch."""
        self.sums.zero_()

    def add(self, learner: int, loss: Tensor) -> None:
        """Count the loss of a step of `GENERATOR` or `STUDENT`."""
        self.sums[learner] += loss.detach()

    def close(self, epoch: int, turns: Turns) -> dict[str, Tensor]:
        """Means of an epoch by name, after the warm-up of the student too, whose least is reported and never taken.

        Raises:
            RuntimeError: if one is not finite.
        """
        mean = self.sums / turns.steps
        if not bool(mean.isfinite().all()):
            raise RuntimeError(
                f"distillation: expected finite losses in epoch {epoch}, got {float(mean[GENERATOR])} of the generator "
                f"and {float(mean[STUDENT])} of the student; lower the learning rate of the one that is not"
            )
        values = {"generator/epoch_loss": mean[GENERATOR]}
        if epoch >= turns.warmup:
            if epoch == turns.warmup:
                self.first.copy_(mean[STUDENT])
            if mean[STUDENT] < self.best[0]:
                self.best.copy_(torch.stack([mean[STUDENT], torch.full_like(mean[STUDENT], epoch)]))
            values |= {"student/epoch_loss": mean[STUDENT], "student/best_epoch": self.best[1]}
        return values

    def facts(self, steps: int) -> dict[str, Any]:
        """The student's mean loss in its first epoch and in the last, of `steps`, and the epoch where it was least."""
        return {
            "loss_first_epoch": float(self.first),
            "loss_last_epoch": float(self.sums[STUDENT] / steps),
            "best_loss_epoch": int(self.best[1]),
            "best_loss": float(self.best[0]),
        }
