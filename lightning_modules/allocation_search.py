"""The search for widths: sensitivities, costs, budgets, the best solutions, and which of them is best as a whole.

Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, arXiv 2006.10518, section
3.4. Theirs needs labels for the loss of every layer and tries every solution on the test set; here the teacher's
predictions on the calibration images decide.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from hydra.utils import instantiate

from allocation import costs
from allocation.additivity import draw_assignments, rank_correlation
from allocation.groups import Bits, Choice, choices_of, find_groups
from allocation.hardware import Pair
from allocation.live import costs_of
from allocation.resources import Resource, Solution, additive
from allocation.sensitivity import Sensitivity
from allocation.solve import SENSITIVITY, solve
from callbacks import report
from datamodules.calibration import CalibrationImages
from lightning_modules.allocation import Allocation, leave
from lightning_modules.allocation_refinement import facts_of, refine
from lightning_modules.stored_sensitivity import Bench, Score
from networks.teachers import Teacher
from quantizers.convert import Conversion
from quantizers.placement import BitWidths
from quantizers.protocol import FLOAT

if TYPE_CHECKING:
    from lightning_modules.job import Job

log = logging.getLogger(__name__)
HALVINGS = 8  # of the sizes between the smallest and the largest network
Resources = dict[str, Resource]


class Search(Allocation):
    """Widths from sensitivities, costs and budgets.

    Args:
        method: from resources and budgets to the best solutions.
        sensitivity: the harm to be kept small.
        weight_bits: widths to choose between.
        activation_bits: the same; None: the job's alone; "same": always that of the weights.
        images: how many calibration images to measure on; None: all.
        minimize: "sensitivity", or a cost to be made small under a budget for the sensitivity.
        budget: the largest amount of "size" (fraction of the bytes of float32 weights), "average_bits" (of the weights
            with a choice), "bitops" (billions an image), "latency" (ms), "energy" (microjoules an image), "memory" (MiB
            an image, peak of activations), "sensitivity"; none at all: as large as with the job's widths everywhere.
        latency_table: csv or json with layer, weight, activation, milliseconds.
        energy_table: csv or json with weight, activation, picojoules; None: Horowitz's.
        keep_top1: find the smallest network that loses at most so many points; by agreement with the teacher on the
            calibration images, which needs no labels.
        judge: "agreement", or "top1" on labelled calibration images.
        additivity: how many random assignments to compare with their prediction.
        rounds: how often sensitivities are measured anew around the best assignment so far; see `refine`.
        name: stands in the results; None: that of the method.

    Raises:
        ValueError: if an argument is not one of those named here.
    """

    searches = True

    def __init__(
        self,
        method: Any,
        sensitivity: Sensitivity,
        *,
        weight_bits: Sequence[int],
        activation_bits: Sequence[int] | str | None = None,
        images: int | None = None,
        minimize: str = "sensitivity",
        budget: Mapping[str, float | None] | None = None,
        latency_table: str | None = None,
        energy_table: str | None = None,
        keep_top1: float | None = None,
        judge: str = "agreement",
        additivity: int = 0,
        rounds: int = 0,
        name: str | None = None,
    ) -> None:
        if judge not in ("agreement", "top1"):
            raise ValueError(f"allocation.judge: expected agreement or top1, got {judge!r}")
        if isinstance(activation_bits, str) and activation_bits != "same":
            raise ValueError(f"allocation.activation_bits: expected a list, null or same, got {activation_bits!r}")
        if keep_top1 is not None and not 0 <= keep_top1 < 100:
            raise ValueError(f"allocation.keep_top1: expected points from 0 to 100, got {keep_top1}")
        self.method, self.sensitivity, self.name = method, sensitivity, name or method.name
        self.weight_bits, self.activation_bits, self.images = list(weight_bits), activation_bits, images
        self.minimize = minimize
        self.budget = {name: float(amount) for name, amount in (budget or {}).items() if amount is not None}
        self.latency_table, self.energy_table = latency_table, energy_table
        self.keep_top1, self.judge, self.additivity, self.rounds = keep_top1, judge, additivity, rounds

    def known(self) -> Bits | None:
        """None: it is to be found."""
        return None

    def pairs(self, job_bits: Pair) -> list[Pair]:
        """All (weight bits, activation bits) to choose between; a side that the job leaves float stays so."""
        weights: Iterable[int] = [FLOAT] if job_bits[0] == FLOAT else self.weight_bits
        if job_bits[1] == FLOAT or self.activation_bits is None:
            return [(weight, job_bits[1]) for weight in weights]
        if self.activation_bits == "same":
            return [(weight, weight) for weight in weights]
        return [(weight, activation) for weight in weights for activation in map(int, self.activation_bits)]

    def find(self, job: Job, teacher: Teacher, conversion: Conversion, images: CalibrationImages) -> Bits:
        """See `Allocation.find`.

        Raises:
            ValueError: if no assignment keeps the budgets, naming the one that is too small.
        """
        cfg = job.cfg
        bits, hardware = instantiate(cfg.bits), instantiate(cfg.hardware)
        groups, pairs = find_groups(conversion), self.pairs(bits)
        choices = choices_of(groups, conversion, instantiate(cfg.protocol), bits, pairs=pairs, hardware=hardware)
        bench = Bench(
            job,
            teacher,
            conversion=conversion,
            images=images,
            groups=groups,
            choices=choices,
            pairs=pairs,
            limit=self.images,
        )
        measured, base = bench.sensitivities(self.sensitivity)
        resources = {SENSITIVITY: additive([found.values.tolist() for found in measured])}
        resources |= costs_of(groups, choices, conversion, hardware, example=teacher.example(), tables=self.tables())
        budgets = self.budgets(bench, choices, teacher, bits)
        solution, tried = self.best(bench, resources, budgets)
        facts: dict[str, Any] = {
            "name": self.name,
            "hardware": hardware.name,
            "budgets": budgets,
            "amounts": solution.amounts,
            "baseline": base,
            "tried": tried,
        }
        if self.additivity:
            facts["additivity"] = self._check_additivity(job, bench, resources)
        job.record.add(allocation=facts)
        return leave(job, bench, measured, solution, facts)

    def tables(self) -> dict[str, str]:
        """Files of measured costs, by resource."""
        if self.latency_table is None and "latency" in (*self.budget, self.minimize):
            raise ValueError("allocation.latency_table: expected a csv or json for the latency, got none")
        named = {"latency": self.latency_table, "energy": self.energy_table}
        return {name: path for name, path in named.items() if path is not None}

    def budgets(
        self, bench: Bench, choices: Sequence[Sequence[Choice]], teacher: Teacher, bits: BitWidths
    ) -> dict[str, float]:
        """Those of the user; without any, what the job's widths everywhere would spend."""
        if self.budget or self.keep_top1 is not None or self.minimize != SENSITIVITY:
            return self.budget
        found = {}
        if any(len({choice.layers[0][0] for choice in own}) > 1 for own in choices):
            found["average_bits"] = float(bits.weight)
        if any(len({choice.sites for choice in own}) > 1 for own in choices):
            macs = costs.macs_of(bench.conversion.reference, bench.groups, teacher.example())
            equal = costs.bitops(bench.groups, bench.options_at([(bits.weight, bits.activation)]), macs)
            found["bitops"] = equal.amount([0] * len(choices))
        log.info("allocation.budget: none given, what W%dA%d everywhere spends: %s", *bits, found)
        return found

    def best(
        self, bench: Bench, resources: Resources, budgets: Mapping[str, float]
    ) -> tuple[Solution, list[dict[str, Any]]]:
        """The solution to use, and what was tried as a whole."""
        if self.keep_top1 is not None:
            return self._smallest(bench, resources, budgets, self.keep_top1)
        solutions = self.method(resources, budgets, self.minimize)
        if len(solutions) == 1 and not self.rounds:
            return solutions[0], []
        scores = [bench.score(solution.chosen) for solution in solutions]
        best = max(range(len(scores)), key=lambda i: (scores[i].agreement, -scores[i].divergence))
        tried = [facts_of(s, score) for s, score in zip(solutions, scores, strict=True)]
        if not self.rounds:
            return solutions[best], tried
        found = refine(
            bench,
            resources,
            budgets,
            start=solutions[best],
            score=scores[best],
            rounds=self.rounds,
            solver=self.method.solver,
            note=lambda solution, score: tried.append(facts_of(solution, score)),
        )
        return found, tried

    def _smallest(
        self, bench: Bench, resources: Resources, budgets: Mapping[str, float], points: float
    ) -> tuple[Solution, list[dict[str, Any]]]:
        """The smallest network found by halving that loses no more than so many points, rounded to nearest."""
        low = solve(resources, budgets, minimize="size")[0].amounts["size"]
        high = min(budgets.get("size", np.inf), sum(float(v.max()) for v in resources["size"].rows[0]))
        tried: list[dict[str, Any]] = []
        kept: Solution | None = None
        for size in (high, low, *[None] * HALVINGS):
            middle = (low + high) / 2 if size is None else size
            solution = self.method(resources, {**budgets, "size": middle}, SENSITIVITY)[0]
            score = bench.score(solution.chosen)
            tried.append(facts_of(solution, score))
            if self._lost(bench, score) <= points:
                kept, high = solution, min(high, solution.amounts["size"])
            elif kept is None:
                raise ValueError(
                    f"allocation.keep_top1: expected a network that loses at most {points} points ({self.judge} on the "
                    f"calibration images), but the largest loses {self._lost(bench, score):.2f}; allow more of either"
                )
            else:
                low = middle
            if high <= low:
                break
        assert kept is not None
        return kept, tried

    def _lost(self, bench: Bench, score: Score) -> float:
        if self.judge == "agreement":
            return 100.0 - score.agreement
        teacher = bench.teacher_top1()
        if teacher is None or score.top1 is None:
            raise ValueError("allocation.judge: top1 expects labelled images (calibration=real); choose agreement")
        return teacher - score.top1

    def _check_additivity(self, job: Job, bench: Bench, resources: Resources) -> dict[str, Any]:
        drawn = draw_assignments([len(own) for own in bench.choices], self.additivity, seed=job.cfg.seed)
        rows = [
            {"predicted": resources[SENSITIVITY].amount(chosen), "measured": bench.score(chosen).divergence}
            | {"size": resources["size"].amount(chosen)}
            for chosen in drawn
        ]
        path = job.folder / "additivity.csv" if job.is_main else None
        report.show_rows("additivity", rows, show=False, path=path)
        correlation = rank_correlation([row["predicted"] for row in rows], [row["measured"] for row in rows])
        return {"spearman": correlation, "assignments": len(rows)}
