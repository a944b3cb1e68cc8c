"""When a run does not begin: its folder has the result already, or it was asked for what only a sweep does."""

from __future__ import annotations

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from callbacks.run_record import config_hash, has_export
from lightning_modules.run_folders import read_facts
from lightning_modules.saved_runs import overrides, plain

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")  # as Lightning spells them


class AlreadyFinishedError(Exception):
    """The folder holds what this run would make.

    Args:
        metrics: those of its record.
    """

    def __init__(self, folder: Path, metrics: dict[str, float]) -> None:
        super().__init__(f"{folder} holds the finished run of this configuration; nothing is done")
        self.metrics = metrics


def expect_unfinished(cfg: DictConfig, folder: Path) -> None:
    """Let a job of a scheduler end where its result stands: it waited so long that a resumed sweep was faster.

    Raises:
        AlreadyFinishedError: if so.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or cfg.evaluate:
        return
    record, now = read_facts(folder), plain(cfg, resolve=False)
    same = record.get("config_hash") == config_hash(now) and has_export(record, plain(cfg).get("export"))
    if same and record.get("status") == "finished":
        raise AlreadyFinishedError(folder, record.get("metrics", {}))


def refuse_precision(cfg: DictConfig) -> None:
    """Raise where the trainer's precision would make networks of other numbers than float32.

    Raises:
        ValueError: unless it is 32-true or a mixed one.
    """
    precision = str(cfg.trainer.get("precision") or "32-true")
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: expected one of {', '.join(PRECISIONS)}, got {precision}; weights, scales and losses "
            "are float32 here"
        )


def refuse_idle_resume(cfg: DictConfig) -> None:
    """Raise where `sweep.resume` was asked for and nothing would heed it.

    Raises:
        ValueError: outside a multirun, or under a sweeper that cannot go on with a sweep.
    """
    if not HydraConfig.initialized() or not cfg.get("sweep", {}).get("resume"):
        return
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        sweeper = hydra.runtime.choices.get("hydra/sweeper")
        if sweeper != "keep_going":
            raise ValueError(
                f"sweep.resume: expected hydra/sweeper=keep_going, which is the default, got {sweeper}, which cannot "
                "go on with a sweep; leave hydra/sweeper or sweep.resume out"
            )
    elif any(override.lstrip("+").startswith("sweep.resume=") for override in overrides()):
        raise ValueError(
            "sweep.resume: expected a multirun, got a single run; add -m to go on with a sweep, or name the folder of "
            "a killed run: resume=outputs/<run>"
        )
