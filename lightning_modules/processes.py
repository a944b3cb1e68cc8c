"""The processes of a run: who may start several, when one ends with another, how many threads each has."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig

log = logging.getLogger(__name__)

PARENT = "CALIBRANT_PARENT"  # the process without which this one has nothing to do
POLL_S = 1.0


def refuse_parallel_multirun(cfg: DictConfig) -> None:
    """Raise for `--multirun` with several processes a job, but where each job is started as a command of its own.

    Lightning starts the further processes of a job with the command line of the first: the whole sweep again.

    Raises:
        ValueError: if `trainer.devices` asks for several processes under a launcher that cannot give them.
    """
    count = process_count(cfg.trainer)
    if count == 1 or not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    tasks = int(os.environ.get("SLURM_NTASKS") or 1)  # Slurm starts them itself
    if hydra.mode == RunMode.MULTIRUN and tasks == 1:
        launcher = hydra.runtime.choices.get("hydra/launcher") or "basic"
        raise ValueError(
            f"trainer.devices: expected 1 in a multirun with hydra/launcher={launcher}, got "
            f"{cfg.trainer.get('devices', 1)}, which is {count} processes a job; each "
            "would run the whole sweep again. Add hydra/launcher=processes (every job a command of its own), or "
            "hydra/launcher=slurm_ddp, or take one device a job"
        )


def process_count(trainer: DictConfig) -> int:
    """The processes that Lightning makes of `conf/trainer`: one for each of `devices`, on each of `num_nodes`.

    `devices` is a number, a list of GPUs (`[1]` is one of them), or `auto` or `-1`: all GPUs that the process can see.

    Raises:
        ValueError: if `devices` is none of these.
    """
    devices = trainer.get("devices", 1)
    return _device_count(devices, str(trainer.get("accelerator", "auto"))) * int(trainer.get("num_nodes") or 1)


def end_with_parent(processes: int) -> None:
    """End this process when the one that started it is gone, so that no orphan waits for it or writes in its stead.

    A further process of a run is killed, since it hangs in a collective; a job of `hydra/launcher=processes` is asked
    to stop (SIGTERM), which saves it. The first of several `processes` passes its number on.
    """
    parent = int(os.environ.get(PARENT) or 0)
    if parent not in (0, os.getpid()):
        further = int(os.environ.get("LOCAL_RANK") or 0) > 0
        ending = signal.SIGKILL if further else signal.SIGTERM
        threading.Thread(target=_watch, args=(parent, ending), daemon=True, name="end-with-parent").start()
    if processes > 1:
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


def _device_count(devices: Any, accelerator: str) -> int:
    if isinstance(devices, ListConfig | list | tuple):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if accelerator in ("gpu", "cuda", "auto") else 1
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise ValueError(f"trainer.devices: expected a number, a list of GPUs, auto or -1, got {text!r}")
    return len(parts) if "," in text else int(text)  # Lightning reads "0,1" as a list


def _watch(parent: int, ending: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_S)
    log.warning("process %s, which started this one, is gone", parent)
    os.kill(os.getpid(), ending)
