"""Pictures of calibration images: a grid in the colours that the network was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from deployment.whole_file import whole_file


def denormalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images (N, C, H, W) back to [0, 1], clamped."""
    shape = (1, -1, 1, 1)
    return (images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def save_grid(
    images: Tensor,
    path: Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    count: int = 64,
    columns: int | None = None,
    pixels: int = 800,
) -> Path:
    """Draw the first `count` images (N, C, H, W) as a square grid in a PNG about `pixels` wide; returns its path.

    With `columns` all images are drawn, that many in a row.
    """
    images = denormalise(images[: count if columns is None else None].detach().float().cpu(), mean, std)
    columns = columns or max(1, round(len(images) ** 0.5))
    grid = make_grid(images, nrow=columns, padding=1, pad_value=1.0)
    zoom = max(1, pixels // grid.shape[-1])
    grid = grid.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    pixel_rows = (grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with whole_file(path) as temporary:
        Image.fromarray(pixel_rows).save(temporary, format="PNG")
    return path
