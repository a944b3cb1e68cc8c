"""From `conf/corrections/*.yaml` to steps: of the float graph before conversion, of the student at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from corrections.base import Calibration, GraphCorrection, StudentCorrection
from corrections.bias_correction import BiasCorrection
from corrections.bn_reestimation import BNReestimation
from corrections.layers import add_missing_biases
from lightning_modules.tuning import Tuning, TuningModule
from quantizers.convert import Conversion
from quantizers.trace import Trace
from synthesis.analytic_ranges import reference_moments

if TYPE_CHECKING:
    from lightning_modules.job import Job

log = logging.getLogger(__name__)

Step = GraphCorrection | StudentCorrection | Callable[..., TuningModule]


class Corrections:
    """An ordered list of corrections, each with a name.

    Attributes:
        applied: what each did, in order, for the record.
        changes_students: whether there is anything to do after reconstruction.

    Args:
        steps: by name, in the order in which they are chosen. Those of the float graph come first, whatever the order.
    """

    def __init__(self, steps: Mapping[str, Step | None]) -> None:
        self.steps = {name: step for name, step in steps.items() if step is not None}
        self.applied: list[dict[str, Any]] = []

    @property
    def changes_students(self) -> bool:
        return any(not isinstance(step, GraphCorrection) for step in self.steps.values())

    def expect_images(self, origin: str) -> None:
        """Refuse, before any work is done, corrections that measure images where there are none.

        Raises:
            ValueError: naming the correction.
        """
        for name, step in self.steps.items():
            asks = step.needs_images if isinstance(step, StudentCorrection) else not isinstance(step, GraphCorrection)
            if asks and origin == "none":
                raise ValueError(
                    f"corrections: expected none that needs images with calibration=none, got {name}; choose "
                    "corrections=bias_correction_analytic or equalization, or calibration=synthetic"
                )

    def warn_of_order(self) -> None:
        """Say so where a correction undoes what the one before it is for."""
        reestimated = False
        for name, step in self.steps.items():
            reestimated |= isinstance(step, BNReestimation) and step.target == "batch_norm"
            if reestimated and isinstance(step, BiasCorrection) and step.layers == "all":
                log.warning(
                    "corrections: %s moves the means of layers that were just given the statistics of BatchNorm to "
                    "those of the calibration images, layer by layer, and activations shrink; set corrections.%s.layers"
                    "=without_batch_norm, or take corrections=light",
                    name,
                    name,
                )

    def expect(self, conversion: Conversion) -> None:
        """Refuse, before any work is done, what cannot be corrected in this student."""
        for step in self.steps.values():
            if isinstance(step, StudentCorrection):
                step.expect(conversion)
            elif isinstance(step, partial) and step.func is TuningModule:
                Tuning(**step.keywords).expect(conversion)

    def prepare(self, traced: Trace) -> None:
        """Correct the folded float graph, in place, before it is converted."""
        self.applied = []  # a network may be converted again, with other widths
        if not self.steps:
            return
        add_missing_biases(traced)
        for name, step in self.steps.items():
            if isinstance(step, GraphCorrection):
                self.applied.append({"correction": name} | step.prepare(traced))

    def apply(self, job: Job, teacher: nn.Module, conversion: Conversion, images: Tensor) -> None:
        """Correct the student, in place; what a step learns can be resumed inside the step."""
        for name, step in self.steps.items():
            if isinstance(step, GraphCorrection):
                continue
            for network in (conversion.student, conversion.reference):
                network.to(job.device)
            if isinstance(step, StudentCorrection):
                facts = step.apply(Calibration(conversion, images, job.cfg.batch_size, expected_means(conversion)))
            else:
                module = step(conversion=conversion, teacher=teacher, images=images, seed=job.cfg.seed)
                module.stage = name  # each step has a checkpoint of its own
                job.fit(module, job.alone(**module.trainer_arguments()))
                facts = module.facts
            self.applied.append({"correction": name} | facts)


def expected_means(conversion: Conversion) -> Callable[[], dict[str, Tensor]]:
    """Computes the expected mean of the tensors of the reference from what BatchNorm stored, of those that have one."""
    return lambda: {name: moments.mean for name, moments in reference_moments(conversion, skip_unknown=True).items()}
