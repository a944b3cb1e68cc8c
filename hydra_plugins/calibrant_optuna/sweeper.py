"""`hydra/sweeper=optuna`: a search over what the command line leaves open, on Optuna.

Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", KDD 2019, arXiv 1907.10902.

Hydra imports every module of a plugin at each start, but those with a leading underscore. These need Optuna, this does
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """Asks Optuna for overrides, launches them in batches, and tells it what the jobs return.

    Args:
        sampler: names by `_target_` what is called with `seed` for each trial: Optuna's samplers, or our grid.
        direction: `maximize` or `minimize`, one for each number that a job returns.
        n_trials: of the whole study, whichever process or earlier call ran them; pruned and failed ones count.
        n_jobs: trials in a batch, which the launcher may run side by side.
        seed: of every proposal; None: another one each time.
        storage: None: `study.journal` in the sweep's folder; a path of a journal file, which also serves several
            machines over NFS; or the URL of a database, such as sqlite:///study.db.
        study_name: several studies may share a storage.
        params: the search space, as on the command line, which goes before it.
        prune: None, or `overrides`, `without`, `keep`, `startup`: see `_prune.Prune`.
    """

    def __init__(
        self,
        *,
        sampler: DictConfig,
        direction: str | Sequence[str],
        n_trials: int,
        n_jobs: int,
        seed: int | None,
        storage: str | None,
        study_name: str,
        params: Mapping[str, Any] | None,
        prune: Mapping[str, Any] | None,
    ) -> None:
        if n_trials < 1 or n_jobs < 1:
            raise ValueError(f"n_trials, n_jobs: expected at least 1, got {n_trials} and {n_jobs}")
        self.sampler = sampler
        self.directions = [direction] if isinstance(direction, str) else list(direction)
        if not self.directions or any(one not in ("maximize", "minimize") for one in self.directions):
            raise ValueError(f"direction: expected maximize or minimize, one a number, got {self.directions}")
        self.n_trials = n_trials
        self.n_jobs = n_jobs
        self.seed = seed
        self.storage = storage
        self.study_name = study_name
        self.params = dict(params or {})
        self.prune = prune
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook.

        Raises:
            ValueError: for `sweep.resume`, which is of another sweeper.
        """
        if OmegaConf.select(config, "sweep.resume"):
            raise ValueError(
                "sweep.resume: expected a sweep of all combinations, got hydra/sweeper=optuna, which goes on with a "
                "search by itself; leave sweep.resume out and name what to go on with: hydra.sweep.dir=<its folder>, "
                "or the same hydra.sweeper.storage"
            )
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search; leaves `optimization_results.yaml` and `trials.csv` in the sweep's folder.

        Raises:
            ImportError: without Optuna.
            ValueError: for a search space or settings that cannot be, or that are not those of the study to go on with.
            RuntimeError: if no trial succeeded.
        """
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise ImportError("hydra/sweeper=optuna needs Optuna: pip install calibrant[search]") from error
        from hydra_plugins.calibrant_optuna._results import Results
        from hydra_plugins.calibrant_optuna._search import Search
        from hydra_plugins.calibrant_optuna._space import read_space
        from hydra_plugins.calibrant_optuna._study import open_study, sampler_factory

        assert self.launcher is not None
        assert self.config is not None
        assert self.hydra_context is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        written = [f"{key}={value}" for key, value in self.params.items()]
        space = read_space([*written, *arguments], self.hydra_context.config_loader)
        study = open_study(
            self.storage or str(folder / "study.journal"), self.study_name, self.directions, space.distributions
        )
        study.sampler = sampler_factory(self.sampler, space.distributions, self.seed)
        results = Results(folder, study, OmegaConf.select(self.config, "optimized_metric"))
        search = Search(
            study,
            space,
            launch=self.launcher.launch,
            expect_legal=lambda overrides: self.validate_batch_is_legal([overrides]),
            n_trials=self.n_trials,
            n_jobs=self.n_jobs,
            prune=self.prune,
        )
        search.run(after_batch=results.write)
        results.show()
        search.expect_success()
