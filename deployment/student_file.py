"""A quantized student in one safetensors file: it loads back bitwise, without calibrating again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from deployment.whole_file import expect_no_folder, whole_file
from quantizers.layer import ActivationSite, QuantizedLayer, quantizers_of

FAMILY, VERSION = "calibrant student ", 1  # a reader knows its own version and those before
FORMAT = f"{FAMILY}{VERSION}"
SWITCHED_OFF, GRIDS = "switched_off", "grids"


def save_student(student: nn.Module, path: Path, facts: Mapping[str, str]) -> Path:
    """Write the student's state (float weights, roundings, scales, zero points) and `facts` as metadata.

    Also the grid of each quantizer, and which parts are switched off: a tensor that no calibration image reached stays
    in float. The file appears whole: it is written under a temporary name and renamed.
    """
    expect_no_folder(path)
    state = {key: value.detach().cpu().clone().contiguous() for key, value in student.state_dict().items()}
    off = json.dumps([path for path, part in _switches(student).items() if not part.enabled])
    metadata = {"format": FORMAT, SWITCHED_OFF: off, GRIDS: json.dumps(_grids(student))}
    with whole_file(path) as temporary:
        save_file(state, temporary, metadata=metadata | dict(facts))
    return path


def load_student(student: nn.Module, path: Path, expected: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """Fill a freshly converted student from a file and return the file's facts.

    Args:
        student: converted from the same teacher with the same protocol, bits and quantizers.
        path: written by `save_student`.
        expected: facts that must be the same in the file, such as the teacher's hash.

    Raises:
        ValueError: if the file is missing, corrupt, of another format, made for another network, or if a fact differs.
    """
    facts, state = _read(path)
    for key, value in (expected or {}).items():
        if facts.get(key) != value:
            raise ValueError(
                f"student file: {key} is {facts.get(key)!r} in {path}, but {value!r} here; they are of two runs: take "
                "the file that belongs to this one"
            )
    own, switches = student.state_dict(), _switches(student)
    off, grids = _off(facts, path), _kept_grids(facts, path)
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shared = sorted(own.keys() & state.keys())
    shapes = [k for k in shared if (own[k].shape, own[k].dtype) != (state[k].shape, state[k].dtype)]
    surplus += [path for path in off if path not in switches]
    if missing or surplus or shapes:
        raise ValueError(
            f"student file: {path} does not fit this student (missing {missing[:3]}, unexpected {surplus[:3]}, other "
            f"shapes or types {shapes[:3]}); use the configuration it was made with"
        )
    for name, grid in _grids(student).items():
        if grids is not None and grids.get(name) != grid:
            raise ValueError(
                f"student file: the grid of {name} is {grids.get(name)} in {path}, but {grid} here (bits, signed, "
                "symmetric); use the bits and protocol it was made with"
            )
    with torch.no_grad():
        student.load_state_dict(state)
    for name, part in switches.items():
        part.enabled = name not in off
    return facts


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Facts and tensors of a student file; safetensors holds numbers and text only, so nothing is ever executed."""
    if not path.exists():
        raise ValueError(f"student file: expected {path}, which does not exist; a finished run leaves it in its folder")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            made = facts.get("format", "")
            version = made.removeprefix(FAMILY)
            if made.startswith(FAMILY) and re.fullmatch("[0-9]{1,9}", version) and int(version) > VERSION:
                raise ValueError(
                    f"student file: {path} is of version {version}, made by a newer calibrant; this one reads up to "
                    f"{VERSION}; pip install --upgrade calibrant"
                )
            if made != FORMAT:
                raise ValueError(f"student file: expected format {FORMAT!r}, got {made or None!r} in {path}")
            return facts, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"student file: {path} is not a readable safetensors file ({error})") from error


def _off(facts: Mapping[str, str], path: Path) -> list[str]:
    off = _decoded(facts, SWITCHED_OFF, "[]", path)
    if not isinstance(off, list) or not all(isinstance(name, str) for name in off):
        raise _corrupt(SWITCHED_OFF, path, f"expected a list of names, got {off!r:.80}")
    return off


def _kept_grids(facts: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """The grid of each quantizer; None in files from before they were kept."""
    grids = _decoded(facts, GRIDS, "null", path)
    if grids is not None and not isinstance(grids, dict):
        raise _corrupt(GRIDS, path, f"expected [bits, signed, symmetric] by name, got {grids!r:.80}")
    return grids


def _decoded(facts: Mapping[str, str], key: str, missing: str, path: Path) -> Any:
    try:
        return json.loads(facts.get(key, missing))
    except (ValueError, RecursionError) as error:
        raise _corrupt(key, path, str(error)) from error


def _corrupt(key: str, path: Path, why: str) -> ValueError:
    return ValueError(
        f"student file: {key} in the metadata of {path} is corrupt ({why}); copy it from the run's folder once more"
    )


def _grids(student: nn.Module) -> dict[str, list[Any]]:
    """Bits, signed, symmetric of each quantizer: the shapes of a student are the same for other widths."""
    return {path: [q.grid.bits, q.grid.signed, q.grid.symmetric] for path, q in quantizers_of(student)}


def _switches(student: nn.Module) -> dict[str, QuantizedLayer | ActivationSite]:
    return {path: m for path, m in student.named_modules() if isinstance(m, QuantizedLayer | ActivationSite)}
