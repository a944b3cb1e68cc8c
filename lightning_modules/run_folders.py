"""The files of a run's folder, read as data; what cannot be read is a `ValueError` that names file and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG, RECORD = Path(".hydra", "config.yaml"), "record.json"
GROUPS = ("model", "protocol", "weight", "activation", "bits")  # that every run has


def read_yaml(path: Path, argument: str) -> DictConfig | ListConfig:
    """A YAML file, its interpolations as they are written.

    Raises:
        ValueError: if it is none.
    """
    try:
        return OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(
            f"{argument}: expected a YAML file as a run leaves it, got {path}, which is corrupt ({one_line(error)}); "
            "copy it from the run's folder once more"
        ) from error


def read_configuration(folder: Path, argument: str) -> DictConfig:
    """The configuration of a run, its interpolations as they are written.

    Raises:
        ValueError: if the folder has none, it is corrupt, or it lacks a group that every run has.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{argument}: expected the folder of an earlier run, with {CONFIG}, got {folder}, without it")
    loaded = read_yaml(path, argument)
    lacks = [name for name in GROUPS if not isinstance(loaded, DictConfig) or not _is_group(loaded, name)]
    if not isinstance(loaded, DictConfig) or lacks:
        raise ValueError(
            f"{argument}: {path} is no configuration of a run: expected the groups {', '.join(GROUPS)}, got none of "
            f"{', '.join(lacks)}; copy it from the run's folder once more"
        )
    return loaded


def read_facts(folder: Path) -> dict[str, Any]:
    """The record of a run; empty where there is none.

    Raises:
        ValueError: if it is no record.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"record: {path} is corrupt ({one_line(error)}); copy it from the run's folder once more, or remove it"
        ) from error
    if not isinstance(facts, dict):
        raise ValueError(f"record: expected facts by name in {path}, got {facts!r:.80}; copy it from the run's folder")
    return facts


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length."""
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def _is_group(loaded: DictConfig, name: str) -> bool:
    return name in loaded and (OmegaConf.is_interpolation(loaded, name) or OmegaConf.is_dict(loaded[name]))
