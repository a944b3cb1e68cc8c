"""Signals that ask a run to stop: it saves where it is at the end of the step, then is requeued or exits.

SIGUSR2 is what Slurm sends through submitit before a time limit or a preemption. submitit's own handler requeues at
once, in the midst of a step; Lightning's broadcasts to the other processes from inside a handler, which can hang them.
Here handlers only set a flag.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from callbacks.checkpoint import StageCheckpoint
from callbacks.run_record import config_hash
from lightning_modules.saved_runs import plain

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
RESTARTED = "CALIBRANT_RESTARTED"  # set by launchers in a job that ran before


class Interrupted(SystemExit):
    """A signal stopped the run. The process exits with 128 + the signal's number, as shells count."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


class Interruption:
    """Listens to SIGTERM and SIGUSR2 while it is open.

    In a training the flag is read at the end of a step (`StopAtStep`); elsewhere the run stops at once, with what its
    finished stages have saved. On leaving, a run that SIGUSR2 stopped is given to the handler found on entering:
    submitit's, which requeues the job and exits. In such a job SIGTERM only announces what comes next, a requeue or the
    end, so the run saves and goes on.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.save_due = False
        self.training = False
        self.closing = False
        self.scheduled = "SUBMITIT_EXECUTOR" in os.environ
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self.previous = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self.previous.items():
            _install(signum, handler or signal.SIG_DFL)
        if not isinstance(error, Interrupted):
            return
        if rank_zero_only.rank > 0:
            raise SystemExit(0)  # at another code Lightning kills the first process, which may still be saving
        requeue = self.previous.get(signal.SIGUSR2)
        if error.signum == signal.SIGUSR2 and callable(requeue):
            requeue(error.signum, None)

    def listen(self) -> None:
        """Take the signals; again after Lightning has put its own handler in place."""
        for signum in SIGNALS:
            _install(signum, self.receive)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """The handler."""
        log.warning("%s received", signal.Signals(signum).name)
        if self.scheduled and signum == signal.SIGTERM:
            self.save_due = True
            return
        self.signum = signum
        if not self.training and not self.closing:
            self.stop(signum)

    def stop(self, signum: int | None) -> None:
        """Leave the run by an exception, once."""
        self.closing = True
        raise Interrupted(signum or signal.SIGTERM)


class StopAtStep(pl.Callback):
    """At the end of a step after a signal: write the stage's checkpoint, then stop. All processes of a run agree.

    Args:
        interruption: the run's.
        observers: its other callbacks; without a `StageCheckpoint` among them nothing is saved.
    """

    def __init__(self, interruption: Interruption, observers: Iterable[pl.Callback]) -> None:
        self.interruption = interruption
        self.checkpoints = [observer for observer in observers if isinstance(observer, StageCheckpoint)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.interruption.training = True
        self.interruption.listen()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        asked = self.interruption
        agree = trainer.strategy.reduce_boolean_decision
        if not agree(asked.save_due or asked.signum is not None, all=False):
            return
        for checkpoint in self.checkpoints:
            checkpoint.save(trainer, pl_module)
        asked.save_due = False
        if agree(asked.signum is not None, all=False):
            asked.stop(asked.signum)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.interruption.training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.interruption.training = False


def go_on_after_restart(cfg: DictConfig, folder: Path) -> None:
    """Let a job that was requeued resume in its own folder, where an earlier try of the same configuration stands."""
    path = folder / "record.json"
    if not restarted() or cfg.resume or cfg.evaluate or not path.exists():
        return
    earlier, now = json.loads(path.read_text())["config"], plain(cfg)
    if config_hash(earlier) == config_hash(now):
        cfg.resume = str(folder)


def restarted() -> bool:
    """Whether this process belongs to a job that ran before: Slurm counts restarts, our launchers say so."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 or RESTARTED in os.environ


def _install(signum: int, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
        signal.signal(signum, handler)
