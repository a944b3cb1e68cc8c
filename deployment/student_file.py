"""A quantized student in one safetensors file: it loads back bitwise, without calibrating again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from quantizers.layer import ActivationSite, QuantizedLayer

FORMAT = "calibrant student 1"
SWITCHED_OFF = "switched_off"


def save_student(student: nn.Module, path: Path, facts: Mapping[str, str]) -> Path:
    """Write the student's state (float weights, roundings, scales, zero points) and `facts` as metadata.

    Also which parts are switched off: a tensor that no calibration image reached stays in float. The file appears
    whole: it is written under a temporary name and renamed.
    """
    state = {key: value.detach().cpu().clone().contiguous() for key, value in student.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    off = json.dumps([path for path, part in _switches(student).items() if not part.enabled])
    save_file(state, temporary, metadata={"format": FORMAT, SWITCHED_OFF: off, **facts})
    temporary.replace(path)
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
    if not path.exists():
        raise ValueError(f"student file: expected {path}, which does not exist; a finished run leaves it in its folder")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"student file: {path} is not a readable safetensors file ({error})") from error
    if facts.get("format") != FORMAT:
        raise ValueError(f"student file: expected format {FORMAT!r}, got {facts.get('format')!r} in {path}")
    for key, value in (expected or {}).items():
        if facts.get(key) != value:
            raise ValueError(f"student file: {key} is {facts.get(key)!r} in {path}, but {value!r} here")
    own = student.state_dict()
    switches, off = _switches(student), json.loads(facts.get(SWITCHED_OFF, "[]"))
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    surplus += [path for path in off if path not in switches]
    if missing or surplus or shapes:
        raise ValueError(
            f"student file: {path} does not fit this student (missing {missing[:3]}, unexpected {surplus[:3]}, other "
            f"shapes {shapes[:3]}); use the configuration it was made with"
        )
    with torch.no_grad():
        student.load_state_dict(state)
    for name, part in switches.items():
        part.enabled = name not in off
    return facts


def _switches(student: nn.Module) -> dict[str, QuantizedLayer | ActivationSite]:
    return {path: m for path, m in student.named_modules() if isinstance(m, QuantizedLayer | ActivationSite)}
