"""From pixels to what a teacher was trained on: resize, crop, scale to [0, 1], normalise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

INTERPOLATIONS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes (..., C, H, W) to normalised float32 of the same shape.

    Raises:
        ValueError: if the number of channels is not that of `mean`.
    """
    if pixels.shape[-3] != len(mean):
        raise ValueError(
            f"model.mean: the model takes {len(mean)} channels, the images have {pixels.shape[-3]}; "
            "choose data that fits the model"
        )
    shift = torch.tensor(list(mean)).view(-1, 1, 1)
    scale = torch.tensor(list(std)).view(-1, 1, 1)
    return pixels.float().div_(255).sub_(shift).div_(scale)


def pixel_transform(
    input_size: Sequence[int], resize: int | None, interpolation: str = "bilinear"
) -> Callable[[Image.Image], Tensor]:
    """PIL image to bytes (C, H, W): short side to `resize` pixels with antialiasing, then the centre.

    Args:
        input_size: (C, H, W) of the model.
        resize: short side; None leaves the size alone.
        interpolation: "bilinear" or "bicubic".

    Raises:
        ValueError: if the interpolation is unknown or the crop is larger than the resized image.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"model.interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    _, height, width = input_size
    if resize is not None and resize < max(height, width):
        raise ValueError(f"model.resize: expected at least the input size {max(height, width)}, got {resize}")
    steps = [CenterCrop([height, width]), PILToTensor()]
    if resize is not None:
        # On PIL images antialiasing is always on; the argument only matters for tensors.
        steps.insert(0, Resize(resize, INTERPOLATIONS[interpolation]))
    return Compose(steps)
