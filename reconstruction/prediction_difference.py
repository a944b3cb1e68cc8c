"""Prediction difference: a unit's error, and how far the network's prediction is off with that unit quantized.

Liu et al., "PD-Quant: Post-Training Quantization Based on Prediction Difference Metric", CVPR 2023, arXiv 2212.07048.
We use one forward of the unit for both terms (the released code adds one without dropping), and leave out the paper's
distribution correction of the unit's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from reconstruction.activations import ActivationCache
from reconstruction.objectives import Objective, PowerError
from reconstruction.tail import divergence


@dataclass(frozen=True)
class PredictionDifference(Objective):
    """`error + weight * KL(softmax(t / T) || softmax(y / T))`, t the float logits, y those behind the quantized unit.

    From the unit's output on, y is computed by the float network.

    Args:
        weight: of the divergence (published: 10, its code divides by 0.1).
        temperature: T (published: 4; 1 for mobile networks).
        error: of the unit's outputs.

    Raises:
        ValueError: if the weight is negative or the temperature not positive.
    """

    weight: float = 10.0
    temperature: float = 4.0
    error: Objective = field(default_factory=PowerError)

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight: expected 0 or more, got {self.weight}; PD-Quant uses 10")
        if self.temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}; PD-Quant uses 4")

    @property
    def weighted(self) -> bool:
        """As its error."""
        return self.error.weighted

    def enter(self, cache: ActivationCache, kept: Tensor) -> None:
        """What its error needs."""
        self.error.enter(cache, kept)

    def errors(self, cache: ActivationCache, outputs: Sequence[Tensor], index: Tensor | slice) -> Tensor:
        """Both terms of each image; costs a forward of the tail, and in training its backward."""
        error = self.error.errors(cache, outputs, index)
        logits = cache.tail(outputs, cache.tail_inputs(index))
        (teacher,) = cache.pick([cache.logits], index)
        return error + self.weight * divergence(teacher, logits, self.temperature)
