"""Ranges of activations from calibration images: one pass, everything in float, every batch counts."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.layer import float_mode, sites

log = logging.getLogger(__name__)


@torch.no_grad()
def calibrate_ranges(student: nn.Module, images: Tensor, batch_size: int) -> None:
    """Sets the range of every activation quantizer from what it sees on all `images` (N, C, H, W), normalised.

    Weights and activations are float meanwhile. Batches are moved to the student's device; the last one may be smaller.
    A site that no image reaches (a branch never taken) is switched off, with a warning.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}. Try 32.")
    if images.ndim < 2 or len(images) == 0:
        raise ValueError(f"images: expected a non-empty batch (N, C, H, W), got shape {tuple(images.shape)}.")
    found = dict(sites(student))
    if not found:
        return
    device = next((t.device for t in (*student.parameters(), *student.buffers())), images.device)
    observers: dict[str, Any] = {path: s.quantizer.range.observer(s.quantizer.grid) for path, s in found.items()}
    seen: set[str] = set()
    modes = {module: module.training for module in student.modules()}
    handles = [site.register_forward_pre_hook(_watch(observers[path], path, seen)) for path, site in found.items()]
    try:
        student.eval()
        with float_mode(student):
            for batch in images.split(batch_size):
                student(batch.to(device))
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    for path, site in found.items():
        if path in seen:
            site.quantizer.set_range(*(t.to(device) for t in observers[path].compute()))
        else:
            site.enabled = False
            log.warning("%s: no calibration image reaches this tensor, it stays in float", path)


def _watch(observer: Any, path: str, seen: set[str]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        observer.update(inputs[0].detach().float())
        seen.add(path)

    return hook
