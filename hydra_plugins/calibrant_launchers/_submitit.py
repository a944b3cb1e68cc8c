"""hydra-submitit-launcher in which a job that dies becomes a failed result, and one that is requeued goes on.

The stock launcher ends with the first job that leaves no result (out of memory, scancel, a lost node); others go on,
but what they return is lost. And Ctrl-C leaves all of them running.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from submitit.core.utils import UncompletedJobError
from submitit.slurm.slurm import SlurmJob

from hydra_plugins.calibrant_launchers._environment import importable
from hydra_plugins.calibrant_launchers._queue import TABLE

log = logging.getLogger(__name__)

RESTARTED = "CALIBRANT_RESTARTED"  # read by lightning_modules/interruption.py
RESULT_WITHIN_S = 5  # of a job's end its file has to appear on this node; each dead job in turn costs as much
COLUMNS = ("job", "slurm_id", "overrides", "log", "folder")


class OneJob:
    """A submitted job whose end, whatever it is, is a result."""

    def __init__(self, job: submitit.Job[JobReturn], overrides: Sequence[str], num: int) -> None:
        self.job, self.overrides, self.num = job, list(overrides), num

    def results(self) -> list[JobReturn]:
        """What the first of its processes returned, or a failure that says how the job ended and where its log is."""
        try:
            return [self.job.results()[0]]
        except UncompletedJobError:
            state = getattr(self.job, "state", "unknown")
            failure = RuntimeError(f"job #{self.num} ({self.job.job_id}) ended as {state}; its log: {self.log}")
        except Exception as error:  # of the job, outside of what Hydra catches; or its result cannot be read
            failure = RuntimeError(f"job #{self.num} ({self.job.job_id}) failed: {_last_line(error)}; see {self.log}")
        log.error("%s", failure)
        result = JobReturn(overrides=self.overrides, status=JobStatus.FAILED)
        result.return_value = failure
        return [result]

    @property
    def log(self) -> Path:
        """Standard error and output of the first process; they may be one file."""
        paths = self.job.paths
        return Path(str(paths.stderr if paths.stderr.exists() or not paths.stdout.exists() else paths.stdout))


def _last_line(error: Exception) -> str:
    """Of the traceback in what submitit raises for a job that raised, else of the error."""
    lines = [line for line in str(error).split("----------------------")[-2:][0].splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _folder(overrides: Sequence[str], num: int) -> str:
    """Of a job, below the sweep's: what the sweeper named it, else its number."""
    named = [text for text in overrides if text.startswith("hydra.sweep.subdir=")]
    return str(OverridesParser.create().parse_override(named[-1]).value()) if named else str(num)


class Tolerant(BaseSubmititLauncher):
    """See the file; `__call__` and `checkpoint` run in the job, the rest where the sweep was started."""

    restarts = 0
    status_every_s = 60

    def __call__(
        self,
        sweep_overrides: list[str],
        job_dir_key: str,
        job_num: int,
        job_id: str,
        singleton_state: dict[type, Singleton],
    ) -> JobReturn:
        if self.restarts:
            os.environ[RESTARTED] = str(self.restarts)
        return super().__call__(sweep_overrides, job_dir_key, job_num, job_id, singleton_state)

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """The same job once more, told that it ran before: called by submitit as it requeues."""
        self.restarts += 1
        return super().checkpoint(*args, **kwargs)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit all, wait for all; Ctrl-C cancels what has been submitted."""
        if self._EXECUTOR == "slurm" and shutil.which("sbatch") is None:
            raise ValueError(
                "hydra/launcher: expected Slurm's commands on this machine, found no sbatch; start the sweep on a "
                "login node, or try it with hydra/launcher=slurm_local"
            )
        SlurmJob.watcher._delay_s = self.status_every_s  # submitit's own is ten minutes
        SlurmJob._results_timeout_s = RESULT_WITHIN_S
        jobs: list[OneJob] = []
        with self._collecting(jobs, initial_job_idx), importable():
            try:
                return super().launch(job_overrides, initial_job_idx)
            except KeyboardInterrupt:
                log.warning("cancelling %d jobs", len(jobs))
                for one in jobs:
                    one.job.cancel(check=False)
                raise

    @contextmanager
    def _collecting(self, jobs: list[OneJob], first: int) -> Iterator[None]:
        """Let the stock launcher's executor give `OneJob`s, and keep them."""
        note = self._note

        class Executor(submitit.AutoExecutor):
            def map_array(self, fn: Any, *columns: Any) -> list[Any]:
                for num, (job, overrides) in enumerate(
                    zip(super().map_array(fn, *columns), columns[0], strict=True), first
                ):
                    jobs.append(OneJob(job, overrides, num))
                note(jobs)
                return jobs

        stock, submitit.AutoExecutor = submitit.AutoExecutor, Executor  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            submitit.AutoExecutor = stock  # pyright: ignore[reportAttributeAccessIssue]

    def _note(self, jobs: Sequence[OneJob]) -> None:
        """Add a line for each job to `jobs.csv` beside their logs."""
        path = Path(str(self.params["submitit_folder"]).split("%j")[0]) / TABLE
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="") as file:
            table = csv.writer(file)
            if new:
                table.writerow(COLUMNS)
            for one in jobs:
                overrides = " ".join(filter_overrides(one.overrides))
                table.writerow(
                    [one.num, one.job.job_id, overrides, one.job.paths.stderr, _folder(one.overrides, one.num)]
                )


class TolerantSlurm(Tolerant):
    """On Slurm."""

    _EXECUTOR = "slurm"


class TolerantLocal(Tolerant):
    """In processes of this machine."""

    _EXECUTOR = "local"


KINDS: Mapping[str, type[Tolerant]] = {"slurm": TolerantSlurm, "local": TolerantLocal}


def launcher(cluster: str, status_every_s: int, parameters: Mapping[str, Any]) -> Tolerant:
    """The launcher of a kind of cluster.

    Raises:
        ValueError: if the kind is unknown, or jobs may never be requeued.
    """
    if cluster not in KINDS:
        raise ValueError(f"hydra.launcher.cluster: expected one of {list(KINDS)}, got {cluster!r}")
    if parameters.get("max_num_timeout", 1) < 1:
        raise ValueError(
            "hydra.launcher.max_num_timeout: expected at least 1, so that a job that meets its time limit goes on, got "
            f"{parameters['max_num_timeout']}"
        )
    given = {key: value for key, value in parameters.items() if value is not None}
    if "mail_user" not in given:  # Slurm would write to whoever submits
        given.pop("mail_type", None)
    made = KINDS[cluster](**given)
    made.status_every_s = status_every_s
    return made
