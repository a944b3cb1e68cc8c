"""The runs of a sweep: what each was asked for, how it stands, and what it has measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callbacks.report import all_stages, flat
from callbacks.sweep_plan import FAILURE, SweepPlan, is_running, own, read_plan, read_records

STATUSES = ("finished", "running", "waiting", "failed", "interrupted", "not run")
NO_CHOICE = (None, "None", "null")


@dataclass(frozen=True, eq=False)
class Run:
    """One job: its folder's name below the sweep's, how it stands, its record (empty if it left none), its error."""

    name: str
    folder: Path
    status: str
    record: Mapping[str, Any]
    overrides: Sequence[str]
    error: str | None = None
    leaves: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """Its configuration; empty if it left no record."""
        return self.record.get("config", {})

    @property
    def seed(self) -> str:
        """As text, for a failed run may have left nothing but its overrides."""
        return self.value("seed") or ""

    @property
    def seconds(self) -> float | None:
        """Of all stages, those before a kill included; None without a record."""
        if not self.record:
            return None
        return sum(stage["seconds"] for stage in all_stages(self.record))

    def metric(self, network: str, name: str = "top1") -> float | None:
        """`test/<network>/<name>`, or None where it was not measured."""
        return self.record.get("metrics", {}).get(f"test/{network}/{name}")

    def value(self, key: str) -> str | None:
        """What a setting is here: the option of a group, the value of a key, or what the override says."""
        chosen = self.record.get("choices", {}).get(key)
        if chosen not in NO_CHOICE:
            return str(chosen)
        if key in self.leaves:
            return self.leaves[key]
        said = (o.lstrip("+").partition("=") for o in self.overrides)
        return next((value for name, _, value in said if name == key), None)


def read_runs(folder: Path) -> tuple[SweepPlan | None, list[Run]]:
    """The plan, where there is one, and every job and record below a folder, in the order of the plan.

    Raises:
        ValueError: if there is neither.
    """
    plan, records = read_plan(folder), read_records(folder)
    if plan is None and not records:
        raise ValueError(f"folder: expected that of a sweep, with jobs.json or record.json below it, got {folder}")
    alive = plan is None or is_running(folder)
    runs = []
    for job in plan.jobs if plan else []:
        record = records.pop(job.folder, {})
        if record.get("config_hash", job.config_hash) != job.config_hash:
            record = {}  # of another configuration, which this job has not replaced yet
        runs.append(_run(folder, job.folder, record, job.overrides, job.error, alive))
    for name, record in sorted(records.items(), key=lambda item: str(item[1].get("started"))):
        runs.append(_run(folder, name, record, record.get("overrides", []), None, alive))
    return plan, runs


def _run(
    folder: Path, name: str, record: Mapping[str, Any], overrides: Sequence[str], error: str | None, alive: bool
) -> Run:
    status = record.get("status")
    if status == "failed":
        error = str(record.get("error") or error or "failed")
    elif status != "finished":
        failure = folder / name / FAILURE
        if error is None and failure.exists():
            error = str(json.loads(failure.read_text())["error"])
        if error is not None:
            status = "failed"
        elif status is None:
            status = "waiting" if alive else "not run"
        elif not alive:
            status, error = "interrupted", "killed, or the machine went down; sweep.resume=true goes on with it"
    leaves = flat(record.get("config", {}))
    return Run(name, folder / name, str(status), record, own(overrides), error, leaves)
