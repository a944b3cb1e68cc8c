"""The two kinds of corrections: of the float graph before anything is quantized, and of the finished student."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from quantizers.convert import Conversion
from quantizers.trace import Trace

Facts = dict[str, Any]  # what a correction did, for the record


class Calibration(NamedTuple):
    """What a correction of the student may look at.

    `conversion`: student, with hardened quantizers, and float reference on one device. `images`: (N, C, H, W),
    normalised; N may be 0. `batch_size`: images at a time. `expected_means`: computes, without images, the expected
    mean (C,) of every tensor of the reference by node name, but for those behind an operator that is not known.
    """

    conversion: Conversion
    images: Tensor
    batch_size: int
    expected_means: Callable[[], Mapping[str, Tensor]]


class GraphCorrection(ABC):
    """Rewrites the folded float network; the float reference of the student is then the rewritten one."""

    @abstractmethod
    def prepare(self, traced: Trace) -> Facts:
        """Change graph, weights and `norms` in place and return what was done."""


class StudentCorrection(ABC):
    """Changes biases, or weights and their scales, of a student; `needs_images` says whether it can do without any."""

    needs_images = True

    def expect(self, conversion: Conversion) -> None:  # noqa: B027 - most have nothing to ask for
        """Raise ValueError, before any work is done, for a student that cannot be corrected so."""

    @abstractmethod
    def apply(self, calibration: Calibration) -> Facts:
        """Change the student in place and return what was done."""
