"""`hydra/launcher=processes`: every job of a sweep is a command of its own, in a process and a session of its own.

So several processes a job (`trainer=ddp`) work in a multirun: Lightning starts the further ones with the command line
of the first. And whatever ends a job, kill -9 included, ends nothing else and leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.calibrant_launchers._command import command_of
from hydra_plugins.calibrant_launchers._environment import divided, importable
from hydra_plugins.calibrant_launchers._results import RESULT

log = logging.getLogger(__name__)

OUTPUT = "output.log"  # of a job, in its folder
PARENT = "CALIBRANT_PARENT"  # read by lightning_modules/processes.py
OF_ANOTHER_RUN = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


class ProcessesLauncher(Launcher):
    """See the file.

    Args:
        n_jobs: jobs at a time.
        devices: what a job may use, one job at a time on each: `[0, 1]`, or `["0,1", "2,3"]` for two GPUs a job;
            `n_jobs` is their number then. None: all jobs use what this process could.
        device_variable: environment variable that says so to a job.
        timeout_s: after which a job is stopped; None: never.
        stop_s: time that a job has to save itself when it is stopped, before it is killed.
    """

    def __init__(
        self,
        *,
        n_jobs: int = 1,
        devices: Sequence[Any] | None = None,
        device_variable: str = "CUDA_VISIBLE_DEVICES",
        timeout_s: float | None = None,
        stop_s: float = 60.0,
    ) -> None:
        if n_jobs < 1:
            raise ValueError(f"hydra.launcher.n_jobs: expected at least 1, got {n_jobs}")
        self.devices = [str(device) for device in devices or []]
        self.n_jobs = len(self.devices) or n_jobs
        self.device_variable, self.timeout_s, self.stop_s = device_variable, timeout_s, stop_s
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.lock = threading.Lock()  # of `running`, and of Hydra's configuration, of which a process has one
        self.stopping = threading.Event()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all, and return one result a job, failed ones too; Ctrl-C and SIGTERM stop every job, which saves it."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        free: queue.Queue[str | None] = queue.Queue()
        for device in self.devices or [None] * self.n_jobs:
            free.put(device)
        with _sigterm_as_interrupt(), importable(), ThreadPoolExecutor(self.n_jobs) as pool:
            jobs = enumerate(job_overrides, initial_job_idx)
            waiting = [pool.submit(self._run, num, list(overrides), free) for num, overrides in jobs]
            try:
                return [job.result() for job in waiting]
            except BaseException:
                self._stop_all()
                raise

    def _run(self, num: int, overrides: list[str], free: queue.Queue[str | None]) -> JobReturn:
        """One job from its start to its end."""
        result = JobReturn(overrides=list(filter_overrides(overrides)), status=JobStatus.FAILED)
        device = free.get()
        try:
            self._expect_going_on(num)
            cfg, folder = self._folder_of(num, overrides)
            result.hydra_cfg, result.working_dir = OmegaConf.masked_copy(cfg, ["hydra"]), str(folder)
            result.cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
            log.info("\t#%d : %s%s", num, " ".join(result.overrides or []), f" on {device}" if device else "")
            self._wait(num, command_of(self.config, overrides, folder, num), folder, device)
            status, value = pickle.loads((folder / RESULT).read_bytes())
            (folder / RESULT).unlink()
            result.status, result.return_value = JobStatus[status], value
            if result.status == JobStatus.FAILED:
                log.error("job #%d failed: %s; see %s", num, value, folder / OUTPUT)
        except Exception as error:
            log.error("%s", error)
            result.return_value = error
        finally:
            free.put(device)
        return result

    def _folder_of(self, num: int, overrides: Sequence[str]) -> tuple[DictConfig, Path]:
        """The configuration of a job, and where Hydra will have it write."""
        with self.lock:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(cfg):
                cfg.hydra.job.num, cfg.hydra.job.id = num, str(num)
            HydraConfig.instance().set_config(cfg)
            folder = Path(str(cfg.hydra.sweep.dir)) / str(OmegaConf.select(cfg, "hydra.sweep.subdir"))
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT).unlink(missing_ok=True)
        return cfg, folder

    def _wait(self, num: int, command: list[str], folder: Path, device: str | None) -> None:
        """Start the command and wait for it.

        Raises:
            RuntimeError: if the sweep was stopped before, or it ends without a result or takes too long.
        """
        environment = self._environment(folder, device)
        with (folder / OUTPUT).open("ab") as output, self.lock:
            self._expect_going_on(num)  # under the lock: whoever stops the sweep then finds every job that runs
            process = self.running[num] = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            code = process.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            self._end(process)
            raise RuntimeError(f"job #{num} took longer than {self.timeout_s:g} s; see {folder / OUTPUT}") from None
        finally:
            _kill_session(process)
        if not (folder / RESULT).exists():
            raise RuntimeError(f"job #{num} ended with {_ending(code)} and no result; see {folder / OUTPUT}")

    def _environment(self, folder: Path, device: str | None) -> dict[str, str]:
        found: Mapping[str, str] = {**os.environ, **divided(self.n_jobs), PARENT: str(os.getpid())}
        environment = {key: value for key, value in found.items() if key not in OF_ANOTHER_RUN}
        return environment | ({self.device_variable: device} if device is not None else {})

    def _expect_going_on(self, num: int) -> None:
        if self.stopping.is_set():
            raise RuntimeError(f"job #{num} was not started: the sweep was stopped")

    def _stop_all(self) -> None:
        self.stopping.set()
        with self.lock:
            running = [process for process in self.running.values() if process.poll() is None]
        log.warning("stopping %d jobs, which save where they are", len(running))
        for process in running:
            process.terminate()  # the job's first process, which tells the others at the end of a step
        for process in running:
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a job that was asked to stop, and kill it if that takes long."""
        try:
            process.wait(self.stop_s)
        except subprocess.TimeoutExpired:
            _kill_session(process)
            process.wait()


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a job's processes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM to the sweep as Ctrl-C, so that its jobs do not go on without it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
