"""How the command of a job tells the sweep what it returned."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from deployment.whole_file import whole_file

RESULT = "result.pkl"  # in the job's folder, until the sweep has read it


class SaveResult(Callback):
    """Hydra callback of such a command: its first process writes status and returned value, or the error.

    The error's traceback is known here alone, and goes into `failed.json`.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the files by a temporary name and a rename."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        value = job_return._return_value
        if job_return.status == JobStatus.FAILED and isinstance(value, BaseException):
            from callbacks.sweep_report import keep_failure  # slow to import, and what failed has imported most of it

            keep_failure(Path(config.hydra.runtime.output_dir), value)
        try:
            blob = pickle.dumps((job_return.status.name, value))
            pickle.loads(blob)  # some errors can be written but not read
        except Exception:
            blob = pickle.dumps((job_return.status.name, RuntimeError(f"{type(value).__name__}: {value}")))
        path = Path(config.hydra.runtime.output_dir) / RESULT
        with whole_file(path) as temporary:
            temporary.write_bytes(blob)
