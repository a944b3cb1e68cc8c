"""What a sweep sets out to do: its jobs with their folders, kept beside them, and which of them are done already."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from callbacks.run_record import has_export
from deployment.whole_file import whole_file
from synthesis.leases import Lease

PLAN = "jobs.json"
FAILURE = "failed.json"  # of a job that failed, beside its record where it left one
SUPERSEDED = "superseded"  # folder of what other configurations left under the same name
SILENCE = 600.0  # seconds without a sign of life after which a sweep on another host counts as dead
UNNAMED = "default"  # `name` of a configuration that was given none
READABLE = 60  # characters of a folder's name before its hash


@dataclass
class PlannedJob:
    """One job: `folder` below the sweep's, `overrides` that make it, `config_hash` as its record will have it.

    `status`: waiting, done (an earlier run of the sweep finished it), ended, or failed with its `error`. `export`: what
    it writes for other runtimes, which the hash leaves out.
    """

    folder: str
    overrides: list[str]
    config_hash: str
    status: str = "waiting"
    error: str | None = None
    export: dict[str, Any] = field(default_factory=dict)

    def is_done(self, record: Mapping[str, Any]) -> bool:
        """Whether a record of its configuration is all that it asks for."""
        return record["status"] == "finished" and has_export(record, self.export)


@dataclass
class SweepPlan:
    """A sweep: `name` of its configuration, `lines` of overrides that have started it and gone on with it, its jobs."""

    name: str
    lines: list[list[str]]
    jobs: list[PlannedJob] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write `jobs.json`, by a temporary name and a rename."""
        with whole_file(folder / PLAN) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @property
    def command(self) -> str:
        """What starts it."""
        return "\n".join(shlex.join(["python", "run.py", "-m", *line]) for line in self.lines)

    def same_line(self, line: Sequence[str]) -> bool:
        """Whether these overrides are one of its lines, in any order."""
        return any(sorted(own) == sorted(line) for own in self.lines)

    def same_study(self, line: Sequence[str]) -> bool:
        """Whether these overrides sweep over the same keys as one of its lines, and all else is equal."""
        asked = swept_and_fixed(line)
        return asked is not None and any(swept_and_fixed(own) == asked for own in self.lines)


def read_plan(folder: Path) -> SweepPlan | None:
    """The plan in a sweep's folder; None where another sweeper, or none, was at work."""
    path = folder / PLAN
    if not path.exists():
        return None
    facts = json.loads(path.read_text())
    return SweepPlan(facts["name"], facts["lines"], [PlannedJob(**job) for job in facts["jobs"]])


def lease(folder: Path) -> Lease:
    """The right to run the sweep of a folder, which ends with the process that holds it."""
    return Lease(folder / "sweep.lock", SILENCE)


def is_running(folder: Path) -> bool:
    """Whether the process that runs the sweep is alive."""
    if not (folder / "sweep.lock").exists():
        return False
    mine = lease(folder)
    if not mine.acquire():
        return True
    mine.release()
    return False


def own(overrides: Sequence[str]) -> list[str]:
    """The overrides that make a job: without those that say how the sweep is run."""
    return [o for o in overrides if not o.lstrip("+~").startswith(("sweep.", "hydra.", "hydra/"))]


def swept_and_fixed(line: Sequence[str]) -> tuple[set[str], set[str]] | None:
    """The keys over which overrides sweep, and the overrides that all jobs share; None if they cannot be read."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(line))
    except HydraException:
        return None
    params = "hydra.sweeper.params"
    swept = {o.get_key_element().lstrip("+") for o in parsed if o.is_sweep_override() or params in o.get_key_element()}
    swept = {key.removeprefix(f"{params}.") for key in swept}
    fixed = {str(o.input_line) for o in parsed if not o.is_sweep_override() and params not in o.get_key_element()}
    return swept, fixed


def folder_name(overrides: Sequence[str], swept: Sequence[str]) -> str:
    """A name for a job's folder that its overrides decide, in whatever order: swept values to read, and a hash."""
    ordered = sorted(own(overrides))
    sha = hashlib.sha256("\n".join(ordered).encode()).hexdigest()[:8]
    values = [o.partition("=")[2] for o in ordered if o.partition("=")[0] in swept]
    words = [re.sub(r"[^\w.]+", "_", value.rsplit("/", 1)[-1]).strip("_.") for value in values]
    return "-".join([*filter(None, ["-".join(words)[:READABLE].strip("-_.")]), sha])


def last_sweep(folder: Path, name: str, line: Sequence[str]) -> Path | None:
    """The last sweep below `folder` that the same overrides started, else the last of this name.

    Where no name was given, else the last one over the same keys with other values, all other overrides being equal.
    """
    found = [(path.parent, plan) for path in folder.glob(f"*/{PLAN}") if (plan := read_plan(path.parent))]
    found.sort(key=lambda pair: ((pair[0] / PLAN).stat().st_mtime, pair[0].name))
    named = name != UNNAMED
    for fits in (
        lambda plan: plan.same_line(line),
        lambda plan: plan.name == name and (named or plan.same_study(line)),
    ):
        fitting = [path for path, plan in found if fits(plan)]
        if fitting:
            return fitting[-1]
    return None


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every `record.json` below a sweep's folder by the folder of its run, relative to it; unreadable ones left out."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("**/record.json")):
        try:
            record = json.loads(path.read_text())
        except (json.JSONDecodeError, OSError):
            continue  # of another program, or just being replaced on a file system without atomic renames
        if isinstance(record, dict) and "status" in record:
            found[path.parent.relative_to(folder).as_posix()] = record
    return found


def recognise(jobs: Sequence[PlannedJob], records: Mapping[str, Mapping[str, Any]]) -> dict[int, str]:
    """The folder in which an earlier run of the sweep did, or began, a job; by the job's number.

    One that is all the job asks for goes before a finished one without its export, and that before others.

    A record is a job's if its configuration has the same hash. What the hash leaves out, such as the export, may be
    what the sweep is about: several jobs of one hash must have their own overrides in the record too.
    """
    shared = Counter(job.config_hash for job in jobs)
    found: dict[int, str] = {}
    for number, job in enumerate(jobs):
        same = [name for name, record in records.items() if record.get("config_hash") == job.config_hash]
        alike = [name for name in same if sorted(own(records[name].get("overrides", []))) == sorted(job.overrides)]
        fitting = alike or (same if shared[job.config_hash] == 1 else [])
        done = [name for name in fitting if job.is_done(records[name])]
        finished = [name for name in fitting if records[name]["status"] == "finished"]
        if fitting:
            found[number] = (done or finished or fitting)[0]
    return found


def free_folder(job: PlannedJob, taken: Set[str], earlier: SweepPlan | None) -> str:
    """A folder for a job that begins: what it had in the sweep before, its own, or numbered where another job has that.

    Such names as numbers do not tell which job is meant: in a line of another order, or one that lets the sweep grow,
    they are those of other jobs.
    """
    planned = earlier.jobs if earlier is not None else []
    before = {old.folder for old in planned if sorted(old.overrides) == sorted(job.overrides)}
    if len(before) == 1 and not before & taken:
        return before.pop()
    occupied = taken | ({old.folder for old in planned} - before)
    name, number = job.folder, 1
    while name in occupied:
        number += 1
        name = f"{job.folder}_{number}"
    return name


def set_aside(folder: Path, name: str) -> None:
    """Move what another configuration left in a job's folder out of its way, so that nothing is mixed or lost."""
    record = folder / name / "record.json"
    if not record.exists():
        return
    record.replace(record.with_name("record_superseded.json"))  # first: it counts as a result no longer
    place = folder / SUPERSEDED / name
    number = 1
    while place.exists():
        number += 1
        place = folder / SUPERSEDED / f"{name}_{number}"
    place.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(place)
