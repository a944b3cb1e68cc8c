"""Before a sweep starts: nobody else is at work in the folders of its jobs, and each job has one of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from callbacks.run_lease import LOCK, at_work
from callbacks.sweep_plan import PlannedJob, SweepPlan, free_folder
from hydra_plugins.calibrant_launchers._queue import TABLE, refuse_queued

log = logging.getLogger(__name__)

STOPPING_S = 20.0  # time for jobs that stop because what started them is gone

Prepared = Sequence[tuple[PlannedJob, list[str]]]  # jobs with the overrides to launch them with


def expect_nobody(folder: Path, config: DictConfig) -> None:
    """Refuse to start while jobs of an earlier go write, or will, below a sweep's folder.

    Raises:
        ValueError: if Slurm has any, or a process holds the lock of a run.
    """
    logs = str(OmegaConf.select(config, "hydra.launcher.submitit_folder", default="")).split("%j")[0]
    refuse_queued({folder / ".submitit" / TABLE, *([Path(logs).absolute() / TABLE] if logs else [])})
    busy = at_work([path.parent for path in folder.glob(f"**/{LOCK}")], STOPPING_S)
    if busy:
        who = ", ".join(f"{name} in {place.name}" for place, name in busy.items())
        raise ValueError(
            f"hydra.sweep.dir: expected a sweep none of whose jobs runs, but of an earlier go there still are {who}; "
            "wait for them, or stop them (kill), and resume then"
        )


def apart(
    prepared: Prepared,
    todo: Prepared,
    earlier: SweepPlan | None,
    placed: Callable[[Sequence[str], str], list[str]],
) -> list[tuple[PlannedJob, list[str]]]:
    """The jobs to run, those that begin in folders that are no other job's.

    Args:
        prepared: all jobs of the line.
        todo: those of them to run; with `resume=` among the overrides if they go on where they are.
        earlier: the plan of the sweep that is gone on with.
        placed: puts the name of a folder into overrides.
    """
    begins = {id(job) for job, overrides in todo if not any(o.startswith("resume=") for o in overrides)}
    taken = {job.folder for job, _ in prepared if id(job) not in begins}
    found = []
    for job, overrides in todo:
        name = free_folder(job, taken, earlier) if id(job) in begins else job.folder
        if name != job.folder:
            log.info("%s is the folder of %s", name, " ".join(job.overrides))
            job.folder, overrides = name, placed(overrides, name)
        taken.add(name)
        found.append((job, overrides))
    return found
