"""What the configuration in a run's folder may name: parts of this package and of `torch.optim`, not any code there is.

Hydra calls whatever a `_target_` names. The command line is the user's own; a folder may come from somebody else.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.run_folders import one_line

TARGET, TRUST = "_target_", "CALIBRANT_TRUST"
CONF = Path(__file__).resolve().parent.parent / "conf"
METHODS = ("allocation", "corrections", "quantizers", "reconstruction", "synthesis")  # any class of these may be named
OURS = (*METHODS, "networks", "deployment", "datamodules", "callbacks", "lightning_modules", "hydra_plugins", "conf")
OPTIM = "torch.optim"
# What a student is built from: modules whose classes, or functions that, each part of the configuration may name.
STUDENT: Mapping[str, Sequence[str]] = {
    "model": ("networks.teachers.load_teacher",),
    "protocol": ("quantizers.protocol.Protocol",),
    "weight": ("quantizers",),
    "activation": ("quantizers",),
    "bits": ("quantizers.convert.BitWidths",),
    "corrections": ("corrections", "lightning_modules.tuning", OPTIM),
    "allocation": ("allocation", "lightning_modules.allocation", "lightning_modules.allocation_search"),
}
# Arguments by which timm and torchvision load files of their own choice.
FILES = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "weights_backbone"}
# Interpolations that give a value of the configuration, or text; "\0" stands for one inside another.
PLAIN = re.compile(r"\$\{([\w.\[\]\0-]+|oc\.env:\w+(,[^${}]*)?|hydra:[\w.]+|now:[^${}]*)\}")


def expect_allowed(cfg: DictConfig, path: Path, argument: str) -> None:
    """Refuse the configuration of a run that names other code than conf/ does, before any of it is called.

    Beside the classes of the rooms of methods, and the code of those packages that the user trusts.

    Args:
        cfg: as loaded, with its interpolations.
        path: its file, for the message.
        argument: what it was given as, for the message.

    Raises:
        ValueError: naming the key, the target and the remedy.
    """
    expect_plain(cfg, path, argument)
    allowed = (*named_in_conf(), *METHODS, OPTIM)
    _expect(OmegaConf.to_container(cfg, resolve=False), allowed, f"{argument}: {path}: ", "")


def student_parts(cfg: DictConfig, path: Path, argument: str) -> dict[str, Any]:
    """The parts of a configuration that make the student, resolved, as plain containers that are safe to instantiate.

    Raises:
        ValueError: as `expect_allowed`, for what no student needs.
    """
    expect_plain(cfg, path, argument)
    parts: dict[str, Any] = {}
    for name, allowed in STUDENT.items():
        try:
            part: Any = cfg.get(name)
            parts[name] = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        except OmegaConfBaseException as error:
            raise ValueError(
                f"{argument}: {path}: {name} cannot be resolved ({one_line(error)}); copy it from the run's folder anew"
            ) from error
        _expect(parts[name], allowed, f"{argument}: {path}: ", name)
    return parts


def expect_plain(cfg: DictConfig, path: Path, argument: str) -> None:
    """Refuse interpolations that compute: a resolver may be any function, and may make a `_target_` out of text.

    Also targets that are interpolations, and arguments of a network that make its library load files.
    """
    for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False), ""):
        if FILES & set(re.split(r"[.\[]", key)):
            raise ValueError(
                f"{argument}: {path}: {key} makes the network's library load a file, which a saved run may not; "
                "remove it, and name the weights by model.checkpoint"
            )
        if not isinstance(value, str) or "$" not in value:
            continue
        rest, count = value, 1
        while count:
            rest, count = PLAIN.subn("\0", rest)
        if "$" in rest or _is_target(key):  # also a lone one: another interpolation could be put together with it
            raise ValueError(
                f"{argument}: {path}: {key} is computed, or may be, by {value!r}; expected in a saved run no "
                "interpolations but of its own values, oc.env, now and hydra, and none as a target; write out its value"
            )


@cache
def named_in_conf() -> frozenset[str]:
    """Every target that a yaml of conf/ names, but those of Hydra's own launchers and sweepers."""
    files = (path for path in CONF.rglob("*.yaml") if path.relative_to(CONF).parts[0] != "hydra")
    return frozenset(name for path in files for name in re.findall(rf"{TARGET}:\s*([\w.]+)", path.read_text()))


def _expect(container: Any, allowed: Sequence[str], origin: str, part: str) -> None:
    for key, target in _leaves(container, part):
        if not _is_target(key) or _is_allowed(target, allowed):
            continue
        top = target.partition(".")[0] if isinstance(target, str) else ""
        if top in OURS:
            raise ValueError(
                f"{origin}{key} names {target!r}, which is no such part of this calibrant; if a newer one made it, "
                "pip install --upgrade calibrant; otherwise do not use the folder"
            )
        listed = " (listed there, but not importable here)" if top in trusted() else ""
        raise ValueError(
            f"{origin}{key} names {target!r}; expected a part of calibrant or of torch.optim, as nothing else in a "
            f"saved run is called; if this is code of your own, or that you trust alike, set {TRUST}="
            f"{','.join([*trusted(), top or '<package>'])}{listed}; otherwise do not use the folder"
        )


def trusted() -> list[str]:
    """The packages whose code saved runs may name because the user says so, in an environment variable."""
    return [name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip()]


def _is_allowed(target: Any, allowed: Sequence[str]) -> bool:
    if not isinstance(target, str) or re.fullmatch(r"\w+(\.\w+)+", target) is None:
        return False
    if target in allowed:
        return True
    top = target.partition(".")[0]
    if top in trusted() and top not in OURS:
        return top in sys.modules or find_spec(top) is not None
    home, _, name = target.rpartition(".")
    return any(home == own or home.startswith(f"{own}.") for own in allowed) and _is_class(home, name)


def _is_class(home: str, name: str) -> bool:
    """Whether `name` is a class made in that module, not one of the many things that it imports."""
    try:
        found = getattr(import_module(home), name)
    except (ImportError, AttributeError):
        return False
    if not isinstance(found, type):
        return False
    if home.startswith(OPTIM):
        return issubclass(found, Optimizer | LRScheduler)
    return (found.__module__, found.__qualname__) == (home, name)


def _is_target(key: str) -> bool:
    return key.rpartition(".")[2] == TARGET


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries and lists; a target counts as a value whatever it is."""
    if isinstance(value, Mapping) and not _is_target(key):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, Sequence) and not isinstance(value, str) and not _is_target(key):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{key}[{index}]")
    else:
        yield key, value
