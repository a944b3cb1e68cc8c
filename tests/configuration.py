"""Composing the product's configuration in tests."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from quantizers.hessian import ClosedForm

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"

# The whole job in seconds: a tiny network, few images, two steps of everything.
SMALL = (
    "model=tiny",
    "data=fashion_mnist",
    "data.limit=64",
    "calibration.count=8",
    "generator.steps=2",
    "reconstruction.iterations=2",
    "logger=none",
    "show.units=false",
)
NO_IMAGES = tuple(option for option in SMALL if not option.startswith("calibration.count"))


def options(group: str) -> list[str]:
    """Names of the yaml files of a configuration group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(overrides: Iterable[str] = (), folder: Path | None = None) -> DictConfig:
    """The configuration of `python run.py <overrides>`; with a folder, as saved there by a run."""
    cfg = copy.deepcopy(_composed(tuple(overrides)))
    with open_dict(cfg):
        cfg.paths.output = str(folder or "unused")
        cfg.paths.store = str(folder / "store") if folder else "unused"
    if folder is not None:
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    return cfg


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Never to be changed. Several tests ask for the same, and Hydra takes 0.2 s for each."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=False)


def choosing(weight: str) -> list[str]:
    """Overrides that choose a rounding, and the reconstruction that it needs where it is solved in closed form."""
    solved = issubclass(get_class(OmegaConf.load(CONF / "weight" / f"{weight}.yaml")["_target_"]), ClosedForm)
    return [f"weight={weight}", *(["reconstruction=closed_form"] if solved else [])]
