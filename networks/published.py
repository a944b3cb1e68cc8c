"""How publishers of weights prepare images, held against what a model configuration says.

A resize that differs from the one the weights were trained for costs about a point of accuracy and raises no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torchvision.models as torchvision_models

from networks.architectures import Source, import_timm


def published_preprocessing(source: Source, architecture: str, weights: str) -> dict[str, Any] | None:
    """`input_size` (C, H, W), `resize`, `interpolation`, `mean` and `std` as published; None where nobody says.

    Args:
        source, architecture, weights: as in `architectures.published_weights`; None also for names unknown there.
    """
    if source == "timm":
        found = import_timm().get_pretrained_cfg(architecture)
        if found is None:
            return None
        size, mean, std = found.input_size, found.mean, found.std
        resize, interpolation = int(size[-1] / found.crop_pct), found.interpolation
    elif source == "torchvision" and architecture in torchvision_models.list_models(module=torchvision_models):
        members = torchvision_models.get_model_weights(architecture).__members__
        if weights not in members:
            return None
        preset: Any = members[weights].transforms()
        size, mean, std = (3, *preset.crop_size * 2), preset.mean, preset.std
        resize, interpolation = preset.resize_size[0], preset.interpolation.value
    else:
        return None
    return {
        "input_size": tuple(size),
        "resize": resize,
        "interpolation": interpolation,
        "mean": tuple(mean),
        "std": tuple(std),
    }


def disagreements(published: Mapping[str, Any], configured: Mapping[str, Any]) -> str:
    """What differs, both sides named, and the overrides that would follow the publisher; empty if nothing does."""
    differing = {key: value for key, value in published.items() if configured[key] != value}
    if not differing:
        return ""
    sides = ", ".join(f"{key} {_text(configured[key])} instead of {_text(value)}" for key, value in differing.items())
    return f"{sides}; to follow its publisher: {' '.join(f'model.{k}={_text(v)}' for k, v in differing.items())}"


def _text(value: Any) -> str:
    """As on the command line: tuples in brackets, without spaces."""
    if value is None:
        return "null"
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
