"""What all stages of one run share: configuration, folder, loggers, record, ledger, and how a Trainer is made."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, WandbLogger

from callbacks.run_record import RunRecord
from datamodules.calibration import CalibrationSource
from datamodules.ledger import DataLedger

log = logging.getLogger(__name__)

# Checkpoints are data, never code. Lightning before 2.6 has no argument for it, but torch heeds the variable.
SAFE_LOADING = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")


class Job:
    """One run: open it with `with open_job(cfg) as job`, which finishes loggers and record whatever happens.

    Attributes:
        cfg: the run's configuration; with `resume` or `evaluate` the one saved in that folder.
        source: where the calibration images come from.
        folder: where the run's files go.
        record: facts for `record.json`.
        ledger: every real data set that is opened, and at which stage.
        loggers: one set for all stages.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        quieten()
        self.cfg = cfg
        self.folder = folder
        self.record = RunRecord(folder, plain(cfg))
        self.record.add(overrides=overrides(), choices=choices())
        self.source: CalibrationSource = instantiate(cfg.calibration)
        self.ledger = DataLedger(data_free=self.source.origin != "real")
        if cfg.resume:
            keep_metrics(folder / "csv")
        self.loggers: list[Logger] = list(instantiate(cfg.logger).values())
        for logger in self.loggers:
            logger.log_hyperparams(plain(cfg))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage; its seconds and peak memory go into the record."""
        with self.record.stage(name):
            yield

    def trainer(self, **stage_arguments: Any) -> pl.Trainer:
        """A new Trainer for one stage: `conf/trainer`, the run's loggers and observers, and the stage's own needs."""
        observers = list(instantiate(self.cfg.callbacks).values())
        settings = plain(self.cfg.trainer) | {
            "logger": self.loggers or False,
            "callbacks": observers,
            "default_root_dir": self.folder,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return pl.Trainer(**(settings | stage_arguments))

    def fit(
        self, module: pl.LightningModule, trainer: pl.Trainer, datamodule: pl.LightningDataModule | None = None
    ) -> None:
        """Train, going on from this stage's checkpoint where the run was killed in it."""
        checkpoint = self.folder / "checkpoints" / f"{getattr(module, 'stage', type(module).__name__)}.ckpt"
        arguments: dict[str, Any] = {"datamodule": datamodule}
        if self.cfg.resume and checkpoint.exists():
            log.info("resuming from %s", checkpoint)
            arguments |= {"ckpt_path": checkpoint, **SAFE_LOADING}
        trainer.fit(module, **arguments)


@contextmanager
def open_job(cfg: DictConfig) -> Iterator[Job]:
    """Open a run, and close its loggers (`wandb.finish()` included) and its record also when it fails.

    Raises:
        ValueError: if several processes (`trainer.devices`) meet a multirun, where each would run the sweep again.
    """
    refuse_parallel_multirun(cfg)
    cfg, folder = saved_configuration(cfg)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    job = Job(cfg, folder)
    status = "failed"
    try:
        yield job
        status = "finished"
    except BaseException as error:
        job.record.add(error=f"{type(error).__name__}: {error}")
        raise
    finally:
        job.record.add(status=status, data_free=job.ledger.data_free, real_data=job.ledger.entries)
        close(job.loggers, status)


def close(loggers: list[Logger], status: str) -> None:
    """Finish every logger; without `wandb.finish()` the next job of a multirun would write into this run."""
    for logger in loggers:
        logger.finalize("success" if status == "finished" else "failed")
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish(exit_code=0 if status == "finished" else 1)


def saved_configuration(cfg: DictConfig) -> tuple[DictConfig, Path]:
    """The configuration and folder to use: this run's own, or the saved ones that `resume` or `evaluate` name.

    Raises:
        ValueError: if both are given, the folder holds no saved configuration, or other overrides came along.
    """
    if cfg.resume and cfg.evaluate:
        raise ValueError("resume, evaluate: expected one of them, got both")
    for key in ("resume", "evaluate"):
        if not cfg[key]:
            continue
        folder = Path(cfg[key]).absolute()
        saved = folder / ".hydra" / "config.yaml"
        if not saved.exists():
            raise ValueError(f"{key}: expected the folder of an earlier run (with .hydra/config.yaml), got {folder}")
        others = [o for o in overrides() if not o.startswith((f"{key}=", "hydra.", "hydra/"))]
        if others:
            raise ValueError(f"{key}: the saved configuration is used as it is; drop the other overrides {others}")
        loaded = OmegaConf.load(saved)
        assert isinstance(loaded, DictConfig)
        loaded[key] = str(folder)
        loaded.paths.output = str(folder)
        return loaded, folder
    return cfg, Path(cfg.paths.output)


def quieten() -> None:
    """Leave out what Lightning says at every stage of every run; its errors and other warnings stay."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning
    )  # Lightning 2.6 on torch 2.13+
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "The '.*' does not have many workers")  # tensors in memory need none


def keep_metrics(folder: Path) -> None:
    """Rename the csv of an interrupted run, which the csv logger of the resumed one would delete."""
    metrics = folder / "metrics.csv"
    if metrics.exists():
        parts = len(list(folder.glob("metrics_part*.csv")))
        metrics.rename(folder / f"metrics_part{parts + 1}.csv")


def refuse_parallel_multirun(cfg: DictConfig) -> None:
    """Raise for `--multirun` with several processes a job: each process would run the whole sweep again."""
    devices = cfg.trainer.get("devices", 1)
    several = devices not in (1, "1", "auto") and HydraConfig.initialized()
    launcher = HydraConfig.get().runtime.choices.get("hydra/launcher") if several else None
    if several and HydraConfig.get().mode == RunMode.MULTIRUN and launcher in (None, "basic"):
        raise ValueError(
            f"trainer.devices: expected 1 in a multirun with the basic launcher, got {devices}; each process would "
            "run the whole sweep again. Give every job its own process (a submitit launcher) or one device."
        )


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain dictionaries and lists."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def overrides() -> list[str]:
    """What the user wrote on the command line; empty outside Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def choices() -> Mapping[str, str]:
    """The option chosen in each configuration group; empty outside Hydra."""
    return {str(k): str(v) for k, v in HydraConfig.get().runtime.choices.items()} if HydraConfig.initialized() else {}
