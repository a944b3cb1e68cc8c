"""Image grids show the pixels that the network saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from callbacks.sample_grid import save_grid


def test_pixels_are_denormalised_and_enlarged(tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    pixels = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    path = save_grid(images, tmp_path / "images.png", mean=mean, std=std, pixels=130)
    picture = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    zoom = picture.shape[-1] // 13  # two images of 5 pixels, three lines between and around
    first = picture[:, zoom : 6 * zoom : zoom, zoom : 6 * zoom : zoom].float() / 255
    torch.testing.assert_close(first, pixels[0], atol=0.5 / 255 + 1e-6, rtol=0)
    assert list(tmp_path.iterdir()) == [path]
