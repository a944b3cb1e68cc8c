"""The study: where it is kept, who draws the proposals, and which of its trials count.

Several processes may share a study, and a killed one may go on: a proposal is a function of the seed, the trial's place
among those that count, and what is known of earlier trials.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from hydra.utils import instantiate
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from hydra_plugins.calibrant_optuna._space import points

DISCARDED = "discarded/"  # before the trial's number, among the attributes of the study
WORKER = "worker"
SILENCE = timedelta(hours=24)  # after which a trial of another machine is taken for interrupted
PATIENCE = 15.0  # seconds for a database to be opened
SamplerFactory = Callable[..., BaseSampler]


def open_study(
    storage: str, name: str, directions: Sequence[str], distributions: Mapping[str, BaseDistribution]
) -> Study:
    """Make the study, or go on with it.

    Raises:
        ValueError: if it exists with other objectives or another search space.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted_directions: Any = list(directions)
    study = optuna.create_study(
        storage=_storage(storage), study_name=name, directions=wanted_directions, load_if_exists=True
    )
    present = [direction.name.lower() for direction in study.directions]
    if present != list(directions):
        raise ValueError(f"direction: expected {present} as in the study {name!r} in {storage}, got {list(directions)}")
    wanted = {key: distribution_to_json(one) for key, one in distributions.items()}
    known = study.user_attrs.get("space", wanted)
    if known != wanted:
        differing = sorted(key for key in {**known, **wanted} if known.get(key) != wanted.get(key))
        raise ValueError(
            f"search space: expected that of the study {name!r} in {storage}, got another {', '.join(differing)}; "
            "give hydra.sweeper.study_name or hydra.sweeper.storage a new name"
        )
    study.set_user_attr("space", wanted)
    return study


def _storage(storage: str) -> BaseStorage:
    if "://" in storage:
        return _database(storage)
    path = Path(storage).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _database(url: str) -> BaseStorage:
    """Open a database; of several processes that make its tables at once one succeeds, the others try again."""
    waits: dict[str, Any] = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return RDBStorage(url, engine_kwargs=waits)
        except DBAPIError:
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def sampler_factory(
    settings: DictConfig, distributions: Mapping[str, BaseDistribution], seed: int | None
) -> BaseSampler:
    """The sampler that `hydra/sweeper/sampler` names, made anew for each trial."""
    made: SamplerFactory = instantiate(settings)
    target = getattr(made, "func", made)
    if target is Grid:
        return Grid(distributions)
    return Seeded(made, seed)


class Seeded(BaseSampler):
    """A sampler whose draws depend on the seed and the trial's place alone, not on the process that asks.

    Args:
        make: the sampler, from `seed`.
        seed: None: draws that cannot be repeated.
    """

    def __init__(self, make: SamplerFactory, seed: int | None) -> None:
        self.make = make
        self.seed = seed
        self.inner = self._fresh(seed)

    def _fresh(self, seed: int | None) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return self.make(seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        if self.seed is not None:
            text = f"{self.seed}/{place(study, trial.number)}"
            self.inner = self._fresh(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]))
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)


class Grid(BaseSampler):
    """All combinations in order: the trial at place n takes the nth. (Optuna's own grid cannot be told results.)"""

    def __init__(self, distributions: Mapping[str, BaseDistribution], seed: int | None = None) -> None:
        self.points = points(distributions)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.points[place(study, trial.number) % len(self.points)][param_name]


def place(study: Study, number: int) -> int:
    """How many trials before this one count."""
    return number - sum(one < number for one in discarded(study))


def discarded(study: Study) -> set[int]:
    """Trials that are none of the study's `n_trials`: interrupted ones, asked anew, and any that were too many."""
    return {int(key.removeprefix(DISCARDED)) for key in study.user_attrs if key.startswith(DISCARDED)}


def discard(study: Study, number: int) -> bool:
    """End a running trial that shall not count; False if another process was faster."""
    try:
        study.tell(number, state=TrialState.FAIL)
    except (RuntimeError, ValueError):  # it is finished
        return False
    study.set_user_attr(f"{DISCARDED}{number}", True)
    return True


def worker() -> str:
    """This process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def take_up_interrupted(study: Study) -> int:
    """Ask anew what processes that are gone were running, with the same parameters; returns how many."""
    found = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not _is_running(trial) and discard(study, trial.number):
            study.enqueue_trial(trial.params)
            found += 1
    return found


def _is_running(trial: FrozenTrial) -> bool:
    host, _, process = str(trial.user_attrs.get(WORKER, "")).rpartition(":")
    if host != socket.gethostname():
        return trial.datetime_start is not None and datetime.now() - trial.datetime_start < SILENCE
    if int(process) == os.getpid():  # of an earlier life: this process has only started
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
