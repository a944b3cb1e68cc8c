"""The student of a finished run as an object, loaded without the teacher's weights, images or calibration."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import fx

from allocation.groups import Bits
from deployment.student_file import load_student
from lightning_modules.allocation import FILE, read_bits
from lightning_modules.corrections import Corrections
from networks.teachers import Teacher
from quantizers.convert import convert

STUDENT = "student.safetensors"


@dataclass(frozen=True, kw_only=True)
class SavedStudent:
    """Attributes:
    network: takes normalised images (N, C, H, W) on the CPU, gives logits (N, K); in evaluation mode.
    input_size: (C, H, W).
    mean: of the normalisation, one a channel, for pixels in [0, 1].
    std: the same.
    facts: what the run's record says of it: metrics, teacher, config_hash, data_free and the like.
    config: the run's configuration.
    """

    network: fx.GraphModule
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: Mapping[str, Any]
    config: DictConfig

    @property
    def metadata(self) -> dict[str, str]:
        """Config hash, protocol, teacher, data-free or not: what an exported file says of itself."""
        teacher = self.facts.get("teacher", {})
        return {
            "config_hash": str(self.facts.get("config_hash", "")),
            "protocol": str(self.config.protocol.name),
            "teacher": f"{teacher.get('name', self.config.model.name)} {teacher.get('weights_hash', '')}".strip(),
            "data_free": str(self.facts.get("data_free", "")).lower(),
        }


def load_student_from(folder: str | Path) -> SavedStudent:
    """Loads the student of a finished run: bitwise the outputs that it had there.

    The network is built from the configuration with arbitrary weights, converted, and filled from the file: the
    teacher's checkpoint is not needed.

    Args:
        folder: of the run, with `student.safetensors`, `.hydra/config.yaml` and `record.json`.

    Raises:
        ValueError: if one of them is missing, corrupt, of a newer version, or does not fit the others.
    """
    folder = Path(folder)
    cfg = _configuration(folder)
    try:
        with _quiet("networks.teachers"):
            teacher: Teacher = instantiate(cfg.model, pretrained=False, checkpoint=None)
        parts = [instantiate(cfg[name]) for name in ("protocol", "weight", "activation", "bits")]
        corrections = Corrections(instantiate(cfg.get("corrections", {}), _convert_="all"))
    except InstantiationException as error:
        raise (error.__cause__ or error) from None
    bits = _widths(folder, cfg)
    student = convert(teacher.network, teacher.example(), *parts, allocation=bits, prepare=corrections.prepare).student
    load_student(student, folder / STUDENT)
    record = folder / "record.json"
    try:
        facts = json.loads(record.read_text()) if record.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"record: {record} is corrupt ({error})") from error
    student.eval().requires_grad_(False)
    shape = {"input_size": teacher.input_size, "mean": teacher.mean, "std": teacher.std}
    return SavedStudent(network=student, facts=facts, config=cfg, **shape)


def _widths(folder: Path, cfg: DictConfig) -> Bits | None:
    """The widths that the run found for its layers or was given in a file; None: the same for all."""
    if (folder / FILE).exists():
        return read_bits(folder / FILE)
    return instantiate(cfg.allocation).known() if "allocation" in cfg else None


def _configuration(folder: Path) -> DictConfig:
    saved = folder / ".hydra" / "config.yaml"
    if not saved.exists():
        raise ValueError(f"folder: expected that of a finished run, with .hydra/config.yaml, got {folder}")
    loaded = OmegaConf.load(saved)
    if not isinstance(loaded, DictConfig) or any(key not in loaded for key in ("model", "protocol", "bits")):
        raise ValueError(f"folder: {saved} is no configuration of a run")
    if loaded.get("evaluate"):
        raise ValueError(f"folder: {folder} only scored another run; name that one: {loaded.evaluate}")
    return loaded


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Leave out the warning of random weights, which are replaced at once."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
