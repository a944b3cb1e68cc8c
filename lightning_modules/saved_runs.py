"""Runs that were saved: which configuration and folder `resume` and `evaluate` stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from callbacks.run_record import config_hash
from lightning_modules.allowed_targets import expect_allowed
from lightning_modules.run_folders import CONFIG, read_configuration, read_facts

DSG_SWITCHES = ("sda", "lse", "sci")


def saved_configuration(cfg: DictConfig) -> tuple[DictConfig, Path]:
    """The configuration and output folder to use.

    `resume` takes configuration and folder of the killed run; `evaluate` takes the configuration of the finished one
    and writes to a folder of its own, so that the finished run stays as it is; what it exports is chosen anew.

    Raises:
        ValueError: if both are given, the folder holds no saved run or one that names other code than
            `allowed_targets` allows, or other overrides came along.
    """
    own = Path(cfg.paths.output)
    if cfg.resume and cfg.evaluate:
        raise ValueError("resume, evaluate: expected one of them, got both")
    key = "resume" if cfg.resume else "evaluate"
    if not cfg[key]:
        return cfg, own
    folder = Path(cfg[key]).absolute()
    if key == "resume" and folder == own.absolute():
        return _composed_again(cfg, folder), own
    loaded = read_configuration(folder, key)
    allowed = (f"{key}=", "hydra.", "hydra/", *(("export=", "export.") if key == "evaluate" else ()))
    others = [o for o in overrides() if not o.startswith(allowed)]
    if others:
        raise ValueError(f"{key}: the saved configuration is used as it is; drop the other overrides {others}")
    expect_allowed(loaded, folder / CONFIG, key)
    pointed = loaded.get("resume") or loaded.get("evaluate")
    if pointed and Path(str(pointed)).absolute() != folder:
        raise ValueError(f"{key}: {folder} itself only went on with another run; name that one: {key}={pointed}")
    loaded.resume, loaded.evaluate = None, None
    loaded[key] = str(folder)
    if key == "evaluate":
        loaded.export = cfg.get("export", {})
    output = folder if key == "resume" else own
    loaded.paths.output = str(output)
    return loaded, output


def _composed_again(cfg: DictConfig, folder: Path) -> DictConfig:
    """The given configuration, for a run that goes on in its own folder: Hydra has just written over the saved one.

    So a job of a sweep does, whose overrides are at hand.
    """
    begun = read_facts(folder).get("config_hash")
    if begun not in (None, config_hash(plain(cfg, resolve=False))):
        raise ValueError(f"resume: {folder} holds a run of another configuration; go on with that in another folder")
    return cfg


def origin(cfg: DictConfig) -> dict[str, Any]:
    """Overrides and chosen options for the record: this command's, or those of the run that it goes on with.

    What is known of that run's images comes along; a resumed run also takes over what its stages had taken so far, as
    `earlier_stages`.
    """
    source = cfg.resume or cfg.evaluate
    old = read_facts(Path(source)) if source else {}
    if not old:
        return {"overrides": overrides(), "choices": choices()}
    facts = {"overrides": old.get("overrides", []), "choices": old.get("choices", {})}
    done = ("images", "corrections", "allocation")  # and not done again
    facts |= {key: old[key] for key in done if key in old}
    if cfg.resume:
        facts["earlier_stages"] = [*old.get("earlier_stages", []), old.get("stages", {})]
    return facts


def plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """The configuration as plain dictionaries and lists, with its interpolations resolved or as they are written."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def stated(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those left out: null, an empty group, a switch that is off.

    So a new option does not change what a stored result is called. DSG's three switches stay: they are the method.
    """
    return {
        key: value
        for key, value in options.items()
        if key in DSG_SWITCHES or not (value is None or value is False or value == {})
    }


def overrides() -> list[str]:
    """What the user wrote on the command line; empty outside Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def choices() -> Mapping[str, str]:
    """The option chosen in each configuration group; empty outside Hydra."""
    return {str(k): str(v) for k, v in HydraConfig.get().runtime.choices.items()} if HydraConfig.initialized() else {}
