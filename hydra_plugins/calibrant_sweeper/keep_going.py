"""A grid sweeper that runs every job whatever becomes of the others, goes on with an earlier sweep, and always reports.

Hydra's basic sweeper raises what the first failed job raised: what came after it is lost to the caller, and before
Hydra 1.4 no `on_multirun_end` is called. Hydra loads this file at every start, so it imports little.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from callbacks.sweep_plan import PlannedJob, SweepPlan

log = logging.getLogger(__name__)

CALLED_BY_HYDRA = not hydra.__version__.startswith("1.3.")  # on_multirun_end, also when the sweeper raises


class KeepGoingSweeper(BasicSweeper):
    """All combinations, as the basic sweeper makes them; jobs that fail are named at the end, which has exit code 1.

    Jobs have folders named by their overrides. With `sweep.resume=true` those that the last sweep of the same line, or
    that in `hydra.sweep.dir`, has finished are left out, and those that it began go on where they stopped.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook; the sweep's folder is settled here, before launcher and callbacks read it.

        Raises:
            ValueError: if there is no sweep to go on with.
        """
        from callbacks.sweep_plan import own

        self.jobs: list[PlannedJob] = []  # of this line
        said: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)  # some name what only a job knows
        written = said["hydra"]
        params = [o for o in written if o.lstrip("+").startswith("hydra.sweeper.params")]
        self.plan: SweepPlan | None = None
        self.line = [*own(said["task"]), *params]
        self.resumes = bool(OmegaConf.select(config, "sweep.resume"))
        self.names_folders = not any(o.startswith("hydra.sweep.subdir=") for o in written)
        folder = Path(config.hydra.sweep.dir)
        if self.resumes and not folder.exists() and not any(o.startswith("hydra.sweep.dir=") for o in written):
            folder = self._last(folder.parent, str(config.get("name")))
        self.folder = folder.absolute()
        with open_dict(config):
            config.hydra.sweep.dir = str(self.folder)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def _last(self, parent: Path, name: str) -> Path:
        from callbacks.sweep_plan import last_sweep

        found = last_sweep(parent, name, self.line)
        if found is None:
            raise ValueError(
                f"sweep.resume: expected an earlier sweep of these overrides, or of this name where one is set, or "
                f"over the same keys, in {parent.absolute()}, got {name!r}, which has none; name its folder with "
                "hydra.sweep.dir=..., or leave sweep.resume out to start one"
            )
        log.info("going on with the sweep in %s", found)
        return found

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run all jobs that are not finished; Hydra's hook.

        Raises:
            ValueError: if the sweep of this folder is still running, or any of its jobs.
            SystemExit: with code 1 if jobs failed, after all have run and the report is made.
        """
        from callbacks.sweep_plan import lease

        assert self.config is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        right = lease(self.folder)
        if not right.acquire(timeout=2.0):
            raise ValueError(
                f"hydra.sweep.dir: the sweep in {self.folder} is still running: {right.holder}; wait for it, or stop "
                "it. If it went down with its host, this works ten minutes after"
            )
        try:
            OmegaConf.save(self.config, self.folder / "multirun.yaml")
            returns = self._run(arguments)
        except BaseException:
            right.release()
            if self.plan is not None:
                self._end()
            raise
        right.release()
        assert self.plan is not None
        failed = [job for job in self.jobs if job.status == "failed"]
        if failed:
            for job in failed:
                log.error("failed: %s: %s", job.folder, (job.error or "").partition("\n")[0])
            log.error("%d of %d jobs failed; sweep.resume=true runs them again", len(failed), len(self.jobs))
            self._end()
            raise SystemExit(1)
        return returns

    def _end(self) -> None:
        """Call what Hydra 1.3 does not call when a sweeper raises."""
        assert self.hydra_context is not None
        assert self.config is not None
        if not CALLED_BY_HYDRA:
            self.hydra_context.callbacks.on_multirun_end(config=self.config, config_name=None)

    def _run(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Plan, leave out what is done, launch in batches, and write down after each what became of its jobs."""
        from callbacks.sweep_plan import FAILURE, SweepPlan, read_plan, set_aside
        from hydra_plugins.calibrant_sweeper._folders import apart, expect_nobody

        assert self.config is not None
        earlier = read_plan(self.folder) if self.resumes else None
        prepared = self._prepare(arguments)
        expect_nobody(self.folder, self.config)
        todo = self._leave_out(prepared) if self.resumes else prepared
        todo = apart(prepared, todo, earlier, self._placed)
        self.jobs = [job for job, _ in prepared]
        planned, lines = {job.folder: job for job, _ in prepared}, [self.line]
        if earlier is not None:
            planned = {job.folder: job for job in earlier.jobs} | planned
            lines = earlier.lines if earlier.same_line(self.line) else [*earlier.lines, self.line]
        plan = self.plan = SweepPlan(str(self.config.get("name")), lines, list(planned.values()))
        for job, overrides in todo:
            (self.folder / job.folder / FAILURE).unlink(missing_ok=True)
            if not any(o.startswith("resume=") for o in overrides):
                set_aside(self.folder, job.folder)
        plan.write(self.folder)
        returns: list[Sequence[JobReturn]] = []
        first = 0
        for batch in chunks(todo, self.max_batch_size):
            returns.append(self._launch(batch, first))
            first += len(batch)
            plan.write(self.folder)
        return returns

    def _prepare(self, arguments: list[str]) -> list[tuple[Any, list[str]]]:
        """Every job once, with the overrides to launch it with; composing them all finds mistakes before any work."""
        from callbacks.run_record import config_hash
        from callbacks.sweep_plan import PlannedJob, folder_name, own

        assert self.hydra_context is not None
        assert self.config is not None
        loader = self.hydra_context.config_loader
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*self._parse_config(), *arguments])
        swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
        prepared: dict[str, tuple[PlannedJob, list[str]]] = {}
        for combination in self.split_arguments(parsed, None)[0]:
            overrides = [o for o in combination if not o.startswith(("sweep.", "+sweep.", "++sweep."))]
            config = loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.num = len(prepared)
                name = folder_name(overrides, swept) if self.names_folders else str(config.hydra.sweep.subdir)
                config.pop("hydra")
            export: Any = OmegaConf.to_container(config.get("export") or OmegaConf.create(), resolve=True)
            named_by = OmegaConf.to_container(config, resolve=False)
            assert isinstance(named_by, dict)
            hashed = config_hash({str(k): v for k, v in named_by.items()})
            job = PlannedJob(name, own(overrides), hashed, export=export)
            key = " ".join(sorted(job.overrides))
            if key in prepared:
                log.warning("asked for twice, runs once: %s", " ".join(job.overrides))
                continue
            prepared[key] = (job, self._placed(overrides, name))
        return list(prepared.values())

    def _leave_out(self, prepared: Sequence[tuple[Any, list[str]]]) -> list[tuple[Any, list[str]]]:
        """The jobs that are not finished; those that were begun go on in their folders."""
        from callbacks.sweep_plan import read_records, recognise
        from synthesis.store import SampleStore

        SampleStore(Path(OmegaConf.select(self.config, "paths.store"))).forget_dead()  # pyright: ignore
        records = read_records(self.folder)
        known = recognise([job for job, _ in prepared], records)
        todo = []
        for number, (job, overrides) in enumerate(prepared):
            if number not in known:
                todo.append((job, overrides))
                continue
            job.folder = known[number]
            if job.is_done(records[job.folder]):
                job.status = "done"
            else:
                begun = quoted(str(self.folder / job.folder))
                todo.append((job, [*self._placed(overrides, job.folder), f"resume={begun}"]))
        log.info("%d of %d jobs are finished, %d to run", len(prepared) - len(todo), len(prepared), len(todo))
        return todo

    def _placed(self, overrides: Sequence[str], name: str) -> list[str]:
        """The overrides with the folder of sweep and job, for a launcher that composes on another machine."""
        others = [o for o in overrides if not o.startswith(("hydra.sweep.dir=", "hydra.sweep.subdir="))]
        return [
            *others,
            f"hydra.sweep.dir={quoted(str(self.folder))}",
            f"hydra.sweep.subdir={quoted(name)}",
        ]

    def _launch(self, batch: Sequence[tuple[Any, list[str]]], first: int) -> Sequence[JobReturn]:
        """Launch a batch; a launcher that raises fails the jobs of its batch that have no result, not the sweep."""
        from callbacks.sweep_plan import read_records

        assert self.launcher is not None
        try:
            returns = self.launcher.launch([overrides for _, overrides in batch], initial_job_idx=first)
        except Exception as error:
            log.exception("the launcher failed")
            records = read_records(self.folder)
            for job, _ in batch:
                if records.get(job.folder, {}).get("status") == "finished":
                    job.status = "ended"
                else:
                    job.status, job.error = "failed", f"{type(error).__name__}: {error}"
            return []
        for (job, _), found in zip_longest(batch, returns[: len(batch)]):
            job.status = "ended" if found is not None and found.status == JobStatus.COMPLETED else "failed"
            if job.status == "failed":
                error = "the launcher gave no result for it" if found is None else found._return_value
                job.error = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        return returns


def quoted(text: str) -> str:
    """A value as Hydra's override grammar takes it whatever it holds; backslashes count only before a quote."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text)
    return f"'{escaped}'"


def chunks(jobs: Sequence[Any], size: int | None) -> Iterator[Sequence[Any]]:
    """At most `size` jobs at a time."""
    for first in range(0, len(jobs), size or max(1, len(jobs))):
        yield jobs[first : first + (size or len(jobs))]
