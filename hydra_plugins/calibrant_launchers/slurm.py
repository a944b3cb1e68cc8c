"""`hydra/launcher=slurm`, and the same without Slurm, `slurm_local`: what Hydra finds; submitit comes on use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmLauncher(Launcher):
    """Every job of a sweep is a job of Slurm's, a batch of them one array; see `_submitit`.

    Args:
        cluster: "slurm", or "local" for processes of this machine under the same rules.
        status_every_s: longest time between two questions to Slurm about the jobs.
        parameters: those of hydra-submitit-launcher; None leaves one to the cluster.
    """

    def __init__(self, *, cluster: str = "slurm", status_every_s: int = 60, **parameters: Any) -> None:
        self.cluster, self.status_every_s, self.parameters = cluster, status_every_s, parameters

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives.

        Raises:
            ImportError: if hydra-submitit-launcher is not installed.
        """
        try:
            from hydra_plugins.calibrant_launchers import _submitit
        except ImportError as error:
            raise ImportError(
                f"hydra/launcher: expected hydra-submitit-launcher to be installed, got {error}; "
                "pip install calibrant[cluster]"
            ) from error
        self.submitit = _submitit.launcher(self.cluster, self.status_every_s, self.parameters)
        self.submitit.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit, wait for all, and return one result a job, failed ones too."""
        return self.submitit.launch(job_overrides, initial_job_idx)
