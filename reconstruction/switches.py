"""Which parts of a student are switched on while one of its units is learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from quantizers.layer import sites
from reconstruction.learnables import Learnables
from reconstruction.schedules import Phase


class Switches:
    """Sets and restores what learning changes in the student apart from parameters.

    The student is in evaluation mode throughout, so that dropout and the like stay off; only sites that drop train.

    Args:
        student: the calibrated student; sites that are disabled now stay so.
        learnables: of each unit.
        drop: probability of an element to stay float while its unit is learned (QDrop); 0 switches that off.

    Raises:
        ValueError: if `drop` is outside [0, 1).
    """

    def __init__(self, student: nn.Module, learnables: Sequence[Learnables], drop: float) -> None:
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"drop: expected a probability from 0 to below 1, got {drop}; QDrop uses 0.5")
        self.student, self.learnables, self.drop = student, learnables, drop
        self.sites = [site for _, site in sites(student) if site.enabled]

    def deploy(self, phase: Phase = "joint") -> None:
        """Everything as deployed; in the phase "weights" with float activations."""
        self.student.eval()
        for site in self.sites:
            site.enabled = phase != "weights"
            site.drop, site.generator = 0.0, None

    def learn(self, phase: Phase, unit: int, generator: torch.Generator) -> None:
        """As deployed in that phase, but the unit's own sites drop their quantization at random."""
        self.deploy(phase)
        for site in self.learnables[unit].sites if self.drop > 0 else ():
            site.drop, site.generator = self.drop, generator
            site.train()
