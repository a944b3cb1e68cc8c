"""What a sweep has found: the settings in which its runs differ, and means over those that differ in seed alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.run_record import UNHASHED
from callbacks.sweep_plan import SweepPlan
from callbacks.sweep_runs import STATUSES, Run, read_runs

PLACES = ("paths", "logger", "callbacks", "show", "resume", "evaluate", "sweep", "hydra", "data.root")  # no settings
WIDTHS = ("bits", "allocation.budget")  # settings that say how wide, not how it is done


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that differ in nothing but their seed.

    `values`: of the settings in which groups differ, None where there is nothing of the name.
    """

    values: Mapping[str, str | None]
    runs: Sequence[Run]

    @property
    def label(self) -> str:
        """`key=value` of what differs, in one line."""
        return " ".join(f"{key}={value}" for key, value in self.values.items() if value is not None) or "one setting"

    @property
    def method(self) -> str:
        """The same without what says how wide."""
        parts = [f"{k}={v}" for k, v in self.values.items() if v is not None and not k.startswith(WIDTHS)]
        return " ".join(parts) or str(self.runs[0].record.get("row", {}).get("network") or "all")

    @property
    def widths(self) -> str:
        """`W4A4`; with `≈` averages of what an allocation chose."""
        weight, activation = self.average_widths
        if self.facts("allocation", "name") not in (None, "uniform"):
            return f"≈W{weight:.1f}A{activation:.1f}"
        bits = self.runs[0].config["bits"]
        return f"W{bits['weight']}A{bits['activation']}"

    @property
    def average_widths(self) -> tuple[float, float]:
        """Bits of weights and activations, 32 where nothing is quantized."""
        found = self.runs[0].record.get("allocation", {})
        bits = self.runs[0].config["bits"]
        return (
            float(found.get("average_weight_bits") or bits["weight"] or 32),
            float(found.get("average_activation_bits") or bits["activation"] or 32),
        )

    @property
    def images(self) -> str:
        """`128 dsg, 500 steps`, `256 real`, `none`."""
        row = self.runs[0].record.get("row", {})
        if row.get("images") in (None, "none"):
            return str(self.facts("images", "origin") or "none")
        steps = f", {row['generator_steps']} steps" if row.get("generator_steps") else ""
        return f"{row['image_count']} {row['images']}{steps}"

    @property
    def seeds(self) -> str:
        """`0, 1, 2`."""
        return ", ".join(run.seed for run in self.runs)

    @property
    def kib(self) -> float | None:
        """KiB of the quantized weights."""
        found = [run.record["bytes"]["quantized"] / 1024 for run in self.runs if "bytes" in run.record]
        return statistics.mean(found) if found else None

    def facts(self, part: str, name: str) -> Any:
        """A fact of the first run's record."""
        return self.runs[0].record.get(part, {}).get(name)

    def metrics(self, network: str, name: str = "top1") -> list[float]:
        """Of the runs that measured it."""
        return [value for run in self.runs if (value := run.metric(network, name)) is not None]

    def drops(self) -> list[float]:
        """Points of top-1 below the float network."""
        pairs = [(run.metric("float"), run.metric("quantized")) for run in self.runs]
        return [before - after for before, after in pairs if before is not None and after is not None]


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder as it stands: `runs` in the order of the plan, and `settings`, groups of finished ones."""

    folder: Path
    plan: SweepPlan | None
    runs: Sequence[Run]
    keys: Sequence[str]
    settings: Sequence[Setting]

    def count(self, status: str) -> int:
        """How many runs stand so."""
        return sum(run.status == status for run in self.runs)

    @property
    def progress(self) -> str:
        """`12 finished, 1 failed of 14`."""
        parts = [f"{self.count(status)} {status}" for status in STATUSES if self.count(status)]
        return f"{', '.join(parts) or 'nothing'} of {len(self.runs)}"

    @property
    def failed(self) -> list[Run]:
        """Runs that ended without a result."""
        return [run for run in self.runs if run.status in ("failed", "interrupted", "not run")]


def read_sweep(folder: Path) -> Sweep:
    """Read the plan and every record below a folder.

    Raises:
        ValueError: if there is neither.
    """
    plan, runs = read_runs(folder)
    finished = [run for run in runs if run.status == "finished"]
    keys = settings_that_differ(finished)
    return Sweep(folder, plan, runs, keys, group(finished, keys))


def group(runs: Iterable[Run], keys: Sequence[str]) -> list[Setting]:
    """The runs that agree in all these settings, in the order of the first of each."""
    groups: dict[tuple[str | None, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(run.value(key) for key in keys), []).append(run)
    return [Setting(dict(zip(keys, values, strict=True)), members) for values, members in groups.items()]


def settings_that_differ(runs: Sequence[Run]) -> list[str]:
    """As few settings as tell all runs apart that differ in more than seed: overrides first, options, then keys."""
    asked = [o.lstrip("+").partition("=")[0] for run in runs for o in run.overrides]
    chosen = [key for run in runs for key in run.record.get("choices", {}) if key not in UNHASHED]
    keys = sorted({key for run in runs for key in run.leaves if key.split(".")[0] not in UNHASHED})
    kept: list[str] = []
    parts: list[list[Run]] = [list(runs)]
    for key in dict.fromkeys([*asked, *chosen, *keys]):
        if _is_place(key) or _is_seed(key, runs):
            continue
        divided = [split for part in parts for split in _split(part, key)]
        if len(divided) > len(parts):
            kept.append(key)
            parts = divided
    return kept


def _split(runs: Iterable[Run], key: str) -> list[list[Run]]:
    groups: dict[str | None, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.value(key), []).append(run)
    return list(groups.values())


def _is_place(key: str) -> bool:
    return any(key == place or key.startswith((f"{place}.", f"{place}/")) for place in PLACES)


def _is_seed(key: str, runs: Iterable[Run]) -> bool:
    """Whether it is the seed or follows it, as that of the calibration images does."""
    return key == "seed" or (key.endswith(".seed") and all(run.value(key) in (None, run.seed) for run in runs))


def spread(values: Sequence[float]) -> str:
    """`mean ± sample deviation`, the value alone where there is one, nothing where there is none."""
    if not values:
        return ""
    mean = f"{round(statistics.mean(values), 2) + 0.0:.2f}"  # no -0.00
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"
