"""What all stages of one run share: configuration, folder, loggers, record, ledger, and how a Trainer is made."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from callbacks import report
from callbacks.run_lease import only_run_in
from callbacks.run_record import RunRecord
from callbacks.wandb_run import WandbRun
from datamodules.calibration import CalibrationSource
from datamodules.ledger import DataLedger
from lightning_modules.allocation import Allocation, Uniform
from lightning_modules.corrections import Corrections
from lightning_modules.interruption import Interrupted, Interruption, StopAtStep, go_on_after_restart, restarted
from lightning_modules.processes import end_with_parent, limit_threads, process_count, refuse_parallel_multirun
from lightning_modules.refusals import expect_unfinished, refuse_idle_resume, refuse_precision
from lightning_modules.saved_runs import origin, plain, saved_configuration

log = logging.getLogger(__name__)

# Checkpoints are data, never code. Lightning before 2.6 has no argument for it, but torch heeds the variable.
SAFE_LOADING = {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")


class Job:
    """One run: open it with `with open_job(cfg) as job`, which finishes loggers and record whatever happens.

    Attributes:
        cfg: the run's configuration; with `resume` or `evaluate` the one saved in that folder.
        source: where the calibration images come from.
        allocation: where the widths of the layers come from.
        corrections: what is corrected before conversion and after reconstruction.
        folder: where the run's files go.
        record: facts for `record.json`.
        ledger: every real data set that is opened, and at which stage.
        loggers: one set for all stages.
        fitted: the stages that trained in this process.
        interruption: what signals ask for.
    """

    source: CalibrationSource

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        quieten()
        self.cfg = cfg
        self.folder = folder
        self.is_main = rank_zero_only.rank == 0
        report.console.quiet = not self.is_main
        named_by = plain(cfg, resolve=False)
        self.record = RunRecord(folder, plain(cfg), named_by=named_by, device=self.device, write=self.is_main)
        self.record.add(**origin(cfg))
        self.ledger = DataLedger(data_free=True)  # until it is known where the images come from
        self.loggers: list[Logger] = []
        self.fitted: list[str] = []
        self.interruption = Interruption()

    def open(self) -> None:
        """Find out where images and widths come from and what is corrected, and start the configured loggers."""
        self.source = instantiate(self.cfg.calibration)
        self.allocation: Allocation = instantiate(self.cfg.allocation) if "allocation" in self.cfg else Uniform()
        self.corrections = Corrections(instantiate(self.cfg.get("corrections", {}), _convert_="all"))
        self.ledger = DataLedger(data_free=self.source.origin != "real")
        if self.cfg.resume and self.is_main:  # the others start later, when the first may log already
            keep_metrics(self.folder / "csv")
        for settings in self.cfg.logger.values():
            logger: Logger = instantiate(settings)
            self.loggers.append(logger)
            if isinstance(logger, WandbRun):
                logger.describe(self.record.facts)
            logger.log_hyperparams(plain(self.cfg))

    @property
    def checkpoints(self) -> Path:
        """Folder of the stages' checkpoints."""
        return self.folder / "checkpoints"

    @property
    def device(self) -> torch.device:
        """Where the stages compute: the GPU if the trainer uses one."""
        on_gpu = self.cfg.trainer.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
        return torch.device("cuda" if on_gpu else "cpu")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a stage; its seconds and peak memory go into the record."""
        with self.record.stage(name):
            yield
        for logger in self.loggers:
            if isinstance(logger, WandbRun):
                logger.show(self.folder, self.record.facts)

    def log(self, metrics: dict[str, float]) -> None:
        """Hand numbers that come from no Trainer to all loggers."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step=0)

    def trainer(self, **stage_arguments: Any) -> pl.Trainer:
        """A new Trainer for one stage: `conf/trainer`, the run's loggers and observers, and the stage's own needs.

        The smaller `log_every_n_steps` of the two wins, so that a debugging trainer still sees each step.
        """
        observers = list(instantiate(self.cfg.callbacks).values())
        observers.append(StopAtStep(self.interruption, observers))
        chosen = {key: value for key, value in plain(self.cfg.trainer).items() if key != "threads"}
        settings = chosen | {
            "logger": self.loggers or False,
            "callbacks": observers,
            "default_root_dir": self.folder,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        every = [found["log_every_n_steps"] for found in (settings, stage_arguments) if "log_every_n_steps" in found]
        arguments: dict[str, Any] = settings | stage_arguments
        arguments["log_every_n_steps"] = min(every, default=50)
        return pl.Trainer(**arguments)

    def alone(self, **stage_arguments: Any) -> pl.Trainer:
        """A Trainer in this process only, for stages that are not worth sharing."""
        return self.trainer(devices=1, strategy="auto", **stage_arguments)

    def fit(
        self, module: pl.LightningModule, trainer: pl.Trainer, datamodule: pl.LightningDataModule | None = None
    ) -> None:
        """Train, going on from this stage's checkpoint where the run was killed in it."""
        stage = getattr(module, "stage", type(module).__name__)
        checkpoint = self.checkpoints / f"{stage}.ckpt"
        arguments: dict[str, Any] = {"datamodule": datamodule}
        if self.cfg.resume and checkpoint.exists():
            log.info("resuming from %s", checkpoint)
            arguments |= {"ckpt_path": checkpoint, **SAFE_LOADING}
        self.fitted.append(stage)
        trainer.fit(module, **arguments)
        self.record.add(processes=self.record.facts.get("processes", {}) | {stage: trainer.world_size})

    def forget_checkpoints(self) -> None:
        """Remove the checkpoints of all stages: what they led to is saved now, so that no kill can cost the work."""
        for pattern in ("*.ckpt", "*.tmp"):  # the second: of a process that was killed while it wrote one
            for path in self.checkpoints.glob(pattern):
                path.unlink(missing_ok=True)


@contextmanager
def open_job(cfg: DictConfig) -> Iterator[Job]:
    """Open a run, and close its loggers and its record also when it fails.

    A signal to stop (`Interruption`) leaves the status "interrupted"; a job that was requeued goes on in its folder.

    Raises:
        ValueError: if several processes (`trainer.devices`) meet a multirun, where each would run the sweep again; if
            another process is at work in the folder; if `sweep.resume` is asked for where nothing heeds it; or if the
            trainer's precision is none that the networks can have.
        AlreadyFinishedError: if a job of a scheduler comes too late.
    """
    refuse_idle_resume(cfg)
    refuse_parallel_multirun(cfg)
    end_with_parent(process_count(cfg.trainer))
    cfg, folder = saved_configuration(cfg)
    refuse_precision(cfg)
    with ExitStack() as held:
        if rank_zero_only.rank == 0:
            held.enter_context(only_run_in(folder, requeued=restarted()))
        expect_unfinished(cfg, folder)
        go_on_after_restart(cfg, folder)
        limit_threads(cfg)
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        with kept_up(Job(cfg, folder), let_go=held.close) as job:
            yield job


@contextmanager
def kept_up(job: Job, let_go: Callable[[], None]) -> Iterator[Job]:
    """Start loggers; at the end finish them and the record, then `let_go` of the folder: a requeue comes after that."""
    with job.interruption:
        status = "failed"
        try:
            job.open()
            yield job
            status = "finished"
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted) else status
            job.record.add(error=f"{type(error).__name__}: {error}")
            raise
        finally:
            job.interruption.closing = True
            try:
                job.record.add(status=status, data_free=job.ledger.data_free, real_data=job.ledger.entries)
            finally:
                close(job, status)
                let_go()


def close(job: Job, status: str) -> None:
    """Finish every logger; a W&B run left open would take what the next job of a multirun logs."""
    try:
        for logger in job.loggers:
            logger.finalize("success" if status == "finished" else "failed")
    finally:
        for logger in job.loggers:
            if isinstance(logger, WandbRun):
                logger.conclude(job.folder, job.record.facts)


def quieten() -> None:
    """Leave out what Lightning says at every stage of every run; its errors and other warnings stay."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning
    )  # Lightning 2.6 on torch 2.13+
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "The '.*' does not have many workers")  # tensors in memory need none
    warnings.filterwarnings("ignore", "The `srun` command is available")  # a run need not be a job of Slurm's


def keep_metrics(folder: Path) -> None:
    """Rename the csv of an interrupted run, which the csv logger of the resumed one would delete."""
    metrics = folder / "metrics.csv"
    if metrics.exists():
        parts = len(list(folder.glob("metrics_part*.csv")))
        metrics.rename(folder / f"metrics_part{parts + 1}.csv")
    warnings.filterwarnings(
        "ignore", "Experiment logs directory .* exists and is not empty"
    )  # it deletes none of these
