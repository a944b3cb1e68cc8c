"""How much memory cached activations take, and where they should stand."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import fx

from reconstruction.partition import Unit

Residency = Literal["auto", "device", "cpu", "half", "disk"]
SHARE_OF_MEMORY = 0.5  # of what is free now; the rest is for the unit being learned


def estimate_bytes(
    reference: fx.GraphModule, units: Sequence[Unit], count: int, *, parallel: bool = False, weighted: bool = False
) -> int:
    """The most that an `ActivationCache` of `count` images holds at once, in float32, logits apart.

    Counts, for the worst unit, what it and later units read and what it returns, in student and teacher.

    Args:
        reference: the traced float network, with `meta["shape"]` at its nodes.
        units: the partition.
        count: number of images.
        parallel: whether the student reads the teacher's values and has none of its own.
        weighted: whether each target has weights of its size beside it.
    """
    shapes = {node.name: node.meta["shape"] for node in reference.graph.nodes if node.meta.get("shape") is not None}
    last = {name: k for k, unit in enumerate(units) for name in unit.inputs}
    images = set(units[0].inputs)
    alive = set(images)
    worst = 0
    for k, unit in enumerate(units):
        present = alive | set(unit.outputs)
        once = images if k < len(units) - 1 else images | set(unit.outputs)  # the student's own result is not kept
        once = present if parallel else once
        numbers = sum(math.prod(shapes[name][1:]) * (1 if name in once else 2) for name in present)
        weights = sum(math.prod(shapes[name][1:]) for name in unit.outputs) if weighted else 0
        worst = max(worst, numbers + weights)
        alive = {name for name in present if last.get(name, -1) > k}
    return worst * count * torch.float32.itemsize


def choose_residency(wanted: Residency, needed: int, device: torch.device) -> Residency:
    """`wanted`, or for "auto" the first of device, cpu and disk that has room for `needed` bytes.

    Raises:
        ValueError: if `wanted` is no residency.
    """
    if wanted not in get_args(Residency):
        raise ValueError(f"residency: expected one of {get_args(Residency)}, got {wanted!r}")
    if wanted != "auto":
        return wanted
    if device.type == "cuda" and needed <= SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
        return "device"
    if needed <= SHARE_OF_MEMORY * free_memory():
        return "device" if device.type == "cpu" else "cpu"
    return "disk"


def free_memory() -> int:
    """Bytes of main memory that can be used now, file caches included; endless where the system does not tell."""
    try:
        with Path("/proc/meminfo").open() as table:
            return next(int(line.split()[1]) * 1024 for line in table if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names:
            return 1 << 62
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
