"""The processes of a run: who may start several, when one ends with another, how many threads each has."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger(__name__)

PARENT = "CALIBRANT_PARENT"  # the process without which this one has nothing to do
POLL_S = 1.0


def refuse_parallel_multirun(cfg: DictConfig) -> None:
    """Raise for `--multirun` with several processes a job, but where each job is started as a command of its own.

    Lightning starts the further processes of a job with the command line of the first: the whole sweep again.

    Raises:
        ValueError: if `trainer.devices` asks for several processes under a launcher that cannot give them.
    """
    devices = cfg.trainer.get("devices", 1)
    if _is_one(devices) or not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    tasks = int(os.environ.get("SLURM_NTASKS") or 1)  # Slurm starts them itself
    if hydra.mode == RunMode.MULTIRUN and tasks == 1:
        launcher = hydra.runtime.choices.get("hydra/launcher") or "basic"
        raise ValueError(
            f"trainer.devices: expected 1 in a multirun with hydra/launcher={launcher}, got {devices}; each process "
            "would run the whole sweep again. Add hydra/launcher=processes (every job a command of its own), or "
            "hydra/launcher=slurm_ddp, or take one device a job"
        )


def end_with_parent(devices: object) -> None:
    """End this process when the one that started it is gone, so that no orphan waits for it or writes in its stead.

    A further process of a run is killed, since it hangs in a collective; a job of `hydra/launcher=processes` is asked
    to stop (SIGTERM), which saves it. A first process with several `devices` passes its number on.
    """
    parent = int(os.environ.get(PARENT) or 0)
    if parent not in (0, os.getpid()):
        further = int(os.environ.get("LOCAL_RANK") or 0) > 0
        ending = signal.SIGKILL if further else signal.SIGTERM
        threading.Thread(target=_watch, args=(parent, ending), daemon=True, name="end-with-parent").start()
    if not _is_one(devices):
        os.environ[PARENT] = str(os.getpid())


def limit_threads(cfg: DictConfig) -> None:
    """Give torch `trainer.threads` threads; null leaves what the environment says.

    Raises:
        ValueError: if there are less than one.
    """
    threads = cfg.trainer.get("threads")
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"trainer.threads: expected null or at least 1, got {threads}")
    torch.set_num_threads(threads)


def leave_process_group() -> None:
    """End the communication of a shared stage, so that later ones do not wait for processes that are gone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_one(devices: object) -> bool:
    return str(devices) in ("1", "auto", "[0]")


def _watch(parent: int, ending: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    log.warning("process %s, which started this one, is gone", parent)
    os.kill(os.getpid(), ending)
