"""Sensitivities for a job: found in the store, or measured on students at every width and put there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from torch import Tensor

from allocation.groups import Choice, Group, choices_of
from allocation.hardware import Hardware, Pair
from allocation.monotone import Measured, tidy
from allocation.sensitivity import Probe, Sensitivity, divergence
from allocation.swaps import Swaps
from datamodules.calibration import CalibrationImages
from lightning_modules.job import Job
from lightning_modules.saved_runs import plain, stated
from networks.teachers import Teacher
from quantizers.calibrate import calibrate_ranges
from quantizers.convert import Conversion, convert
from quantizers.layer import hardened_copy
from synthesis.store import SampleStore

RECIPE_VERSION = 1  # raise it when the same settings give other sensitivities than before


class Score(NamedTuple):
    """How a whole network does on the calibration images: agreement with the teacher and, where labels are known, top-1
    (per cent), and the mean divergence from the teacher's predictions (nats).
    """

    agreement: float
    divergence: float
    top1: float | None


class Bench:
    """Measures groups and whole assignments of a job's network; students are made when they are first needed.

    Args:
        job: the run.
        teacher: its network.
        conversion: the student with the widths of the job.
        images: calibration images.
        groups: of the conversion.
        choices: the options of each group.
        pairs: the widths that these were made of.
        limit: how many images sensitivities are measured on; None: all.
    """

    def __init__(
        self,
        job: Job,
        teacher: Teacher,
        *,
        conversion: Conversion,
        images: CalibrationImages,
        groups: Sequence[Group],
        choices: Sequence[Sequence[Choice]],
        pairs: Sequence[Pair],
        limit: int | None = None,
    ) -> None:
        self.job, self.teacher, self.conversion, self.images = job, teacher, conversion, images
        self.groups, self.choices, self.pairs = groups, choices, pairs
        self.count = len(images.images) if limit is None else min(limit, len(images.images))
        self.base: int | None = None

    def sensitivities(
        self, sensitivity: Sensitivity, around: Sequence[int] | None = None
    ) -> tuple[list[Measured], float]:
        """For each group the sensitivities of its options, and the harm of the base. Several jobs that ask for the same
        measure the groups between them.

        Args:
            sensitivity: what is measured.
            around: the options of all other groups, where they are not at the base of the sensitivity.
        """
        store = SampleStore(self.job.cfg.paths.store)
        if around is None:
            self.base = sensitivity.base
            recipe = self.recipe(stated(plain(self.job.cfg.allocation.sensitivity)))
        else:
            recipe = self.recipe({"measure": "kl", "around": list(around)})
            self.probe.swaps.base = [own[i] for own, i in zip(self.choices, around, strict=True)]
        if sensitivity.separable:

            def part(number: int) -> Tensor:
                probe = self.probe
                harm = sensitivity.of_group(probe, number - 1) if number else sensitivity.baseline(probe).unsqueeze(0)
                return _expect_finite(harm)

            harm = store.get_or_gather(recipe, len(self.groups) + 1, part)
        else:
            harm = store.get_or_make(
                recipe,
                lambda: _expect_finite(
                    torch.cat([sensitivity.baseline(self.probe).unsqueeze(0), *sensitivity.of_all(self.probe)])
                ),
            )
        parts = harm[1:].split([len(own) for own in self.choices])
        if around is None:
            found = [tidy(part, harm[0], own) for part, own in zip(parts, self.choices, strict=True)]
        else:  # the base has harm itself: what is left of it with the group's best option is no one's
            found = [
                tidy(part, part[part.mean(1).argmin()], own) for part, own in zip(parts, self.choices, strict=True)
            ]
        return found, float(harm[0].mean())

    def recipe(self, sensitivity: Any) -> dict[str, Any]:
        """What the sensitivities depend on."""
        cfg = self.job.cfg
        options = {key: stated(plain(cfg[key])) for key in ("protocol", "weight", "activation", "bits", "corrections")}
        return options | {
            "sensitivities": RECIPE_VERSION,
            "teacher": self.teacher.weights_hash,
            "images": self.images.digest,
            "count": self.count,
            "sensitivity": sensitivity,
            "groups": [list(group.layers) for group in self.groups],
            "choices": [[list(choice.pair) for choice in own] for own in self.choices],
        }

    @functools.cached_property
    def probe(self) -> Probe:
        """Students at every width that is to be chosen, and the teacher's answers."""
        labels = self.images.labels
        return Probe(
            swaps=self._swaps(),
            choices=self.choices,
            reference=self.conversion.reference.to(self.job.device),
            images=self.images.images[: self.count],
            answers=self.answers[: self.count],
            labels=None if labels is None else labels[: self.count],
            batch_size=self.job.cfg.batch_size,
        )

    def score(self, chosen: Sequence[int]) -> Score:
        """An assignment as a whole, rounded to nearest, on all calibration images; needs no label."""
        swaps, labels = self.probe.swaps, self.images.labels
        swaps.assign([own[i] for own, i in zip(self.choices, chosen, strict=True)])
        outputs, answers = swaps.run(self.images.images, self.job.cfg.batch_size), self.answers
        agreement = (outputs.argmax(1) == answers.argmax(1)).double().mean()
        top1 = None if labels is None else float(100 * (outputs.argmax(1) == labels).double().mean())
        return Score(float(100 * agreement), float(divergence(outputs, answers).mean()), top1)

    def teacher_top1(self) -> float | None:
        """The teacher's accuracy on the calibration images, where labels are known."""
        labels = self.images.labels
        return None if labels is None else float(100 * (self.answers.argmax(1) == labels).double().mean())

    @functools.cached_property
    def answers(self) -> Tensor:
        """The teacher's outputs (N, K) on all calibration images."""
        network, device = self.teacher.network.to(self.job.device), self.job.device
        with torch.no_grad():
            batches = self.images.images.split(self.job.cfg.batch_size)
            return torch.cat([network(batch.to(device)).float().cpu() for batch in batches])

    def _swaps(self) -> Swaps:
        extra = [] if self.base is None else [(self.base, self.base)]
        base = None if self.base is None else [own[0] for own in self.options_at(extra)]
        weights, activations = (self._widths(side, extra) for side in (0, 1))
        calibrated: set[int] = set()
        students = []
        for i in range(max(len(weights), len(activations))):
            weight, activation = weights[min(i, len(weights) - 1)], activations[min(i, len(activations) - 1)]
            students.append(self._student((weight, activation), calibrate=activation not in calibrated))
            calibrated.add(activation)
        return Swaps(students, self.groups, base)

    def _widths(self, side: int, extra: Sequence[Pair]) -> list[int]:
        """The widths of one side that students are needed for; those that the protocol holds fixed come with any."""
        asked = {choice.pair[side] for own in self.choices for choice in own}
        wanted = dict.fromkeys(pair[side] for pair in self.pairs if pair[side] in asked)
        return list(wanted | dict.fromkeys(pair[side] for pair in extra)) or [self.pairs[0][side]]

    def options_at(self, pairs: Sequence[Pair]) -> list[list[Choice]]:
        """The options of the groups between other pairs, on any hardware."""
        cfg = self.job.cfg
        protocol, bits = instantiate(cfg.protocol), instantiate(cfg.bits)
        return choices_of(self.groups, self.conversion, protocol, bits, pairs=pairs, hardware=Hardware("any"))

    def _student(self, pair: Pair, *, calibrate: bool) -> Any:
        cfg, layers = self.job.cfg, [layer for group in self.groups for layer in group.layers]
        parts = [instantiate(cfg[name]) for name in ("protocol", "weight", "activation", "bits")]
        conversion = convert(
            self.teacher.network,
            self.teacher.example(),
            *parts,
            allocation=dict.fromkeys(layers, pair),
            prepare=self.job.corrections.prepare,
        )
        student = conversion.student.to(self.job.device)
        if calibrate:
            calibrate_ranges(student, self.images.images, cfg.batch_size)
        return hardened_copy(student).requires_grad_(False)


def _expect_finite(harm: Tensor) -> Tensor:
    if not harm.isfinite().all():
        raise ValueError(
            "allocation.sensitivity: expected finite numbers, got NaN or infinity; a network at few bits gives no "
            "finite output. Leave out the smallest of allocation.weight_bits and activation_bits"
        )
    return harm.float()
