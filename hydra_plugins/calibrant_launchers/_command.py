"""The command line of one job of a sweep."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hydra_plugins.calibrant_sweeper.keep_going import quoted

FLAGS_WITH_VALUE = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
OF_THE_SWEEP = (
    "hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweeper", "hydra.sweep.", "hydra.mode", "hydra.run.dir",
)  # fmt: skip
CALLBACK = "hydra_plugins.calibrant_launchers._results.SaveResult"


def command_of(config: DictConfig, overrides: Sequence[str], folder: Path, num: int) -> list[str]:
    """This process's program and flags with the overrides of one job, writing to `folder`.

    What concerns the sweep itself is left out: its launcher, sweeper and folders.
    """
    said: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    kept = [o for o in said if not o.lstrip("+~").startswith(OF_THE_SWEEP)]
    return [
        sys.executable,
        *_program(),
        *_flags(sys.argv[1:]),
        *kept,
        *overrides,
        "hydra.mode=RUN",
        f"hydra.run.dir={quoted(str(folder))}",
        f"++hydra.job.num={num}",
        f"++hydra.job.id={quoted(str(num))}",
        f"+hydra.callbacks.save_result._target_={CALLBACK}",
    ]


def _program() -> list[str]:
    import __main__

    spec = getattr(__main__, "__spec__", None)
    return ["-m", spec.name] if spec is not None else [str(Path(sys.argv[0]).absolute())]


def _flags(arguments: Sequence[str]) -> list[str]:
    """Those that choose the configuration, with their values."""
    kept: list[str] = []
    for index, argument in enumerate(arguments):
        if argument in FLAGS_WITH_VALUE:
            kept += arguments[index : index + 2]
        elif argument.split("=")[0] in FLAGS_WITH_VALUE:
            kept.append(argument)
    return kept
