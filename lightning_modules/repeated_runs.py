"""A recorded run once more: from its own configuration, with nothing taken from the store, metrics compared bitwise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from callbacks.comparison import metrics_between, origins_between, read_record
from callbacks.run_record import config_hash
from lightning_modules.allowed_targets import expect_allowed
from lightning_modules.processes import process_count
from lightning_modules.run_folders import CONFIG, RECORD, read_yaml
from lightning_modules.saved_runs import plain

EQUAL, DIFFERENT, NOT_COMPARABLE = 0, 1, 3  # exit codes; 2 is argparse's


@dataclass(frozen=True)
class Repetition:
    """What a repeated run says of its record.

    Attributes:
        metrics: rows with `what`, `a` (the record's), `b` (now) and `b - a`.
        origins: rows of versions, machine, weights and data that are not the record's.
        folder: of the repeated run.
    """

    metrics: list[dict[str, Any]]
    origins: list[dict[str, Any]]
    folder: Path

    @property
    def equal(self) -> bool:
        """Whether every metric is the same to the last bit."""
        return bool(self.metrics) and all(row["a"] == row["b"] for row in self.metrics)

    @property
    def code(self) -> int:
        """0: equal; 1: different on the same machine with the same versions; 3: different, as other ones may be."""
        excused = any(row["what"].startswith(("version", "machine", "commit")) for row in self.origins)
        return EQUAL if self.equal else NOT_COMPARABLE if excused else DIFFERENT


def repeat(
    path: Path, folder: Path, run: Callable[[DictConfig], Mapping[str, float]], script: Path | None = None
) -> Repetition:
    """Run a record's configuration in another folder, with a store of its own, and compare.

    Args:
        path: `record.json` of a finished run, or its folder.
        folder: for the repeated run; must not hold one.
        run: the main job.
        script: the same as a file, for a run of several processes: each of them is started by its command line.

    Raises:
        ValueError: if the record is of no finished run, of one that only scored another, names other code than
            `allowed_targets` allows, is of several processes where there is no `script`, or the folder is taken.
    """
    record = read_record(path)
    if record.get("status") != "finished":
        raise ValueError(f"record: expected that of a finished run, got one that is {record.get('status')!r}: {path}")
    if record["config"].get("evaluate"):
        raise ValueError(f"record: {path} only scored another run; name that one: {record['config']['evaluate']}")
    if (folder / RECORD).exists():
        raise ValueError(f"output: expected a folder without a run in it, got {folder}")
    cfg = configuration(record, path if path.is_dir() else path.parent, folder)
    expect_allowed(cfg, path, "record")
    count = process_count(cfg.trainer)
    if count > 1 and script is None:
        raise ValueError(f"record: expected that of one process, got one of {count}; use `calibrant verify` for {path}")
    for own in ("hydra", "defaults"):  # of Hydra itself, in no saved configuration; a command would obey them
        cfg.pop(own, None)
    (folder / CONFIG).parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / CONFIG)
    found = re.search(r", (\d+) threads$", str(record.get("machine")))
    threads = int(found[1]) if found is not None else torch.get_num_threads()  # the order of sums depends on it
    if count > 1 and script is not None:
        _run_command(script, folder, threads)
    else:
        torch.set_num_threads(threads)
        run(cfg)
    again = read_record(folder)
    return Repetition(metrics_between(record, again), origins_between(record, again), folder)


def _run_command(script: Path, folder: Path, threads: int) -> None:
    """The main job as a command, with the configuration saved in the folder.

    Raises:
        ValueError: if it fails; what it printed says why.
    """
    environment = dict(os.environ)
    if threads != torch.get_num_threads():  # else Lightning deals them out among its processes, as it did before
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    saved = folder.absolute() / CONFIG
    given = ["--config-path", str(saved.parent), "--config-name", saved.stem]
    command = [sys.executable, str(script), *given, "hydra.run.dir=${paths.output}"]
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise ValueError(f"record: expected the repeated run to finish, got exit code {code}; see {folder}")


def configuration(record: Mapping[str, Any], home: Path, folder: Path) -> DictConfig:
    """What the run was started with, but for its folders and loggers.

    The saved file beside the record still has its interpolations, so that paths follow the new folder and this
    machine's data; the record itself, should it stand alone, has the old paths in it.
    """
    saved = home / CONFIG
    cfg = read_yaml(saved, "record") if saved.exists() else None
    if not isinstance(cfg, DictConfig) or config_hash(plain(cfg, resolve=False)) != record.get("config_hash"):
        old = str(record["config"]["paths"]["output"])
        cfg = OmegaConf.create(_moved(record["config"], old, str(folder)))
        assert isinstance(cfg, DictConfig)
    cfg.paths.output, cfg.paths.store = str(folder), str(folder / "store")
    cfg.logger, cfg.resume, cfg.evaluate = {}, None, None
    return cfg


def _moved(value: Any, old: str, new: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _moved(part, old, new) for key, part in value.items()}
    if isinstance(value, list):
        return [_moved(part, old, new) for part in value]
    return value.replace(old, new) if isinstance(value, str) else value
