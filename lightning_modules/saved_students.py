"""The student of a finished run as an object, loaded without the teacher's weights, images or calibration."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import fx

from allocation.groups import Bits
from deployment.student_file import load_student
from lightning_modules.allocation import FILE, read_bits
from lightning_modules.allowed_targets import student_parts
from lightning_modules.corrections import Corrections
from lightning_modules.run_folders import CONFIG, RECORD, one_line, read_configuration, read_facts
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
    teacher's checkpoint is not needed. Nothing in the folder is run: `allowed_targets` says what its configuration may
    name.

    Args:
        folder: of the run, with `student.safetensors`, `.hydra/config.yaml` and `record.json`.

    Raises:
        ValueError: if one of them is missing, corrupt, of a newer version, names other code or does not fit the others.
    """
    folder = Path(folder)
    cfg = _configuration(folder)
    facts = read_facts(folder)
    parts = student_parts(cfg, folder / CONFIG, "folder")
    with _explained(folder / CONFIG):
        with _quiet("networks.teachers"):
            teacher: Teacher = instantiate(parts["model"], pretrained=False, checkpoint=None)
        made = [instantiate(parts[name]) for name in ("protocol", "weight", "activation", "bits")]
        corrections = Corrections(instantiate(parts["corrections"] or {}, _convert_="all"))
        bits = _widths(folder, parts["allocation"])
        example = teacher.example()
        student = convert(teacher.network, example, *made, allocation=bits, prepare=corrections.prepare).student
    load_student(student, folder / STUDENT, _teacher(facts))
    student.eval().requires_grad_(False)
    shape = {"input_size": teacher.input_size, "mean": teacher.mean, "std": teacher.std}
    return SavedStudent(network=student, facts=facts, config=cfg, **shape)


def _widths(folder: Path, allocation: Any) -> Bits | None:
    """The widths that the run found for its layers or was given in a file; None: the same for all."""
    if (folder / FILE).exists():
        return read_bits(folder / FILE)
    return instantiate(allocation).known() if allocation else None


def _teacher(facts: Mapping[str, Any]) -> dict[str, str]:
    """What the student file has to say of its teacher, where the record says whose student it is."""
    teacher = facts.get("teacher", {})
    if not isinstance(teacher, Mapping):
        raise ValueError(f"record: expected name and weights_hash of the teacher in {RECORD}, got {teacher!r:.80}")
    return {"teacher": str(teacher["weights_hash"])} if teacher.get("weights_hash") else {}


def _configuration(folder: Path) -> DictConfig:
    loaded = read_configuration(folder, "folder")
    if loaded.get("evaluate"):
        raise ValueError(f"folder: {folder} only scored another run; name that one: {loaded.evaluate}")
    return loaded


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A configuration that does not build a student, as one of a newer version may not, is the file's fault."""
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, ValueError):
            raise ValueError(f"folder: {path}: {cause}") from error
        raise _unfit(path, cause) from error
    except (TypeError, AttributeError, LookupError) as error:
        raise _unfit(path, error) from error


def _unfit(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"folder: expected the configuration of a run of this calibrant, got {path}, of which no student can be built "
        f"({one_line(error)}); if a newer calibrant made it, pip install --upgrade calibrant"
    )


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
