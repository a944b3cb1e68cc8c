"""Who learns when, where a generator and a student are trained in turn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Who learns when.

    Attributes:
        epochs: all of them.
        warmup: the first ones, in which only the generator learns; all of them where only its images are wanted.
        steps: of an epoch.
        range_epochs: after the warm-up, in which activation ranges move with the batches (activation=ema).
    """

    epochs: int
    warmup: int = 0
    steps: int = 200
    range_epochs: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.steps < 1 or self.range_epochs < 0 or not 0 <= self.warmup <= self.epochs:
            raise ValueError(
                "epochs, warmup, steps, range_epochs: expected epochs and steps >= 1, range_epochs >= 0 and no more "
                f"epochs of warm-up than epochs, got {self.epochs}, {self.warmup}, {self.steps} and {self.range_epochs}"
            )

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps

    @property
    def student_steps(self) -> int:
        """Steps that the student takes."""
        return (self.epochs - self.warmup) * self.steps

    def student_step(self, epoch: int, step: int) -> int:
        """Steps that the student took before this one."""
        return (epoch - self.warmup) * self.steps + step

    def observes(self, student_step: int) -> bool:
        """Whether activation ranges move in that step."""
        return student_step < self.range_epochs * self.steps
