"""The loop of a search: ask, launch, tell."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from hydra.core.utils import JobReturn
from optuna.study import Study
from optuna.trial import TrialState

from hydra_plugins.calibrant_optuna._prune import Prune
from hydra_plugins.calibrant_optuna._space import Space, points
from hydra_plugins.calibrant_optuna._study import (
    WORKER,
    Grid,
    discard,
    discarded,
    place,
    take_up_interrupted,
    worker,
)

log = logging.getLogger(__name__)

CHEAP = "cheap_score"
ERROR = "error"
Launch = Callable[..., Sequence[JobReturn]]


class Search:
    """Runs trials until the study has `n_trials`; a trial that fails is a failed trial and no more.

    Args:
        study: with its sampler.
        space: what is drawn.
        launch: of the launcher: (overrides of each job, initial_job_idx) -> what the jobs returned.
        expect_legal: raises for overrides that do not compose.
        n_trials: of the whole study.
        n_jobs: trials in a batch.
        prune: settings of `Prune`; None: every trial is run.
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        *,
        launch: Launch,
        expect_legal: Callable[[list[str]], None],
        n_trials: int,
        n_jobs: int,
        prune: Mapping[str, Any] | None,
    ) -> None:
        self.study = study
        self.space = space
        self.launch = launch
        self.expect_legal = expect_legal
        on_grid = isinstance(study.sampler, Grid)
        self.n_trials = min(n_trials, len(points(space.distributions))) if on_grid else n_trials
        self.n_jobs = n_jobs
        self.prune = None if prune is None else Prune(**prune)
        self.directions = [direction.name.lower() for direction in study.directions]

    def run(self, after_batch: Callable[[], object]) -> None:
        """Go on until the study is full.

        Raises:
            ValueError: if a job returns another number of objectives than there are directions.
        """
        if again := take_up_interrupted(self.study):
            log.info("%d interrupted trials are run again", again)
        while batch := self._ask():
            promising = self._screen([trial for trial in batch if self._composes(trial)])
            jobs = [self.space.overrides(trial.params) for trial in promising]
            for trial, found in zip(promising, self._values(promising, jobs), strict=True):
                self._tell(trial, found)
            after_batch()

    def expect_success(self) -> None:
        """Raise if the study holds failed trials alone."""
        failed = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
        if failed and not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            raise RuntimeError(f"no trial succeeded; the last error: {failed[-1].user_attrs.get(ERROR)}")

    def _ask(self) -> list[optuna.Trial]:
        batch: list[optuna.Trial] = []
        while len(batch) < self.n_jobs and self._taken() < self.n_trials:
            trial = self.study.ask(dict(self.space.distributions))
            trial.set_user_attr(WORKER, worker())
            if place(self.study, trial.number) >= self.n_trials:  # another process took the last one meanwhile
                discard(self.study, trial.number)
                break
            batch.append(trial)
        return batch

    def _taken(self) -> int:
        trials = self.study.get_trials(deepcopy=False)
        return sum(trial.state != TrialState.WAITING for trial in trials) - len(discarded(self.study))

    def _composes(self, trial: optuna.Trial) -> bool:
        own = self.space.overrides(trial.params)
        runs = [own] if self.prune is None else [own, self.prune.overrides(own)]
        try:
            for run in runs:
                self.expect_legal([f"{key}={value}" for key, value in run.items()])
        except Exception as error:
            self._fail(trial, error)
            return False
        return True

    def _screen(self, trials: list[optuna.Trial]) -> list[optuna.Trial]:
        """The trials whose cheap run is among the better ones."""
        prune = self.prune
        if prune is None:
            return trials
        jobs = [prune.overrides(self.space.overrides(trial.params)) for trial in trials]
        promising = []
        for trial, found in zip(trials, self._values(trials, jobs, suffix="_cheap"), strict=True):
            if isinstance(found, Exception):
                self._fail(trial, found)
                continue
            known = [one for one in self.study.get_trials(deepcopy=False) if one.number < trial.number]
            earlier = [one.user_attrs[CHEAP] for one in known if CHEAP in one.user_attrs]
            trial.set_user_attr(CHEAP, found[0])
            if len(self.directions) == 1:
                trial.report(found[0], step=0)
            if prune.is_hopeless(found[0], earlier, self.directions[0]):
                self.study.tell(trial, state=TrialState.PRUNED)
                log.info("trial %d pruned: %.6g in the cheap run", trial.number, found[0])
            else:
                promising.append(trial)
        return promising

    def _values(
        self, trials: Sequence[optuna.Trial], jobs: Sequence[Mapping[str, str]], suffix: str = ""
    ) -> list[list[float] | Exception]:
        """What the job of each trial returned, or why it did not."""
        if not trials:
            return []
        batch = [
            [*(f"{key}={value}" for key, value in own.items()), f"hydra.sweep.subdir=trial_{trial.number:04d}{suffix}"]
            for trial, own in zip(trials, jobs, strict=True)
        ]
        try:
            returned = self.launch(batch, initial_job_idx=trials[0].number)
        except Exception as error:  # a launcher that gives up takes its batch with it, not the search
            return [error] * len(trials)
        return [self._numbers(one) for one in returned]

    def _numbers(self, returned: JobReturn) -> list[float] | Exception:
        try:
            value = returned.return_value
        except Exception as error:
            return error
        try:
            found = [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)]
        except (TypeError, ValueError) as error:
            return error
        if not all(math.isfinite(one) for one in found):
            return ValueError(f"expected finite numbers, got {found}")
        if len(found) != len(self.directions):
            raise ValueError(
                f"direction: expected one for each number that a job returns ({len(found)}), got {self.directions}; "
                "set hydra.sweeper.direction, or optimized_metric to as many names"
            )
        return found

    def _tell(self, trial: optuna.Trial, found: list[float] | Exception) -> None:
        if isinstance(found, Exception):
            self._fail(trial, found)
            return
        self.study.tell(trial, found)
        log.info("trial %d: %s", trial.number, ", ".join(f"{value:.6g}" for value in found))

    def _fail(self, trial: optuna.Trial, error: Exception) -> None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        trial.set_user_attr(ERROR, text[:1000])
        self.study.tell(trial, state=TrialState.FAIL)
        log.error("trial %d failed: %s", trial.number, text[:200])
