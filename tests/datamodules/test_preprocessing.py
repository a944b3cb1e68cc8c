"""Preprocessing against torchvision's reference pipeline and against arithmetic by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms._presets import ImageClassification

from datamodules.preprocessing import normalize, pixel_transform

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_equals_the_preset_that_ships_with_published_weights(picture: Image.Image, interpolation: str):
    preset = ImageClassification(
        crop_size=48, resize_size=56, interpolation=transforms.InterpolationMode(interpolation)
    )
    ours = normalize(pixel_transform((3, 48, 48), 56, interpolation)(picture), MEAN, STD)
    torch.testing.assert_close(ours, preset(picture), rtol=0, atol=1e-6)


def test_resize_is_antialiased_pil_on_the_short_side(picture: Image.Image):
    resized = picture.resize((int(130 * 56 / 90), 56), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 48) / 2), round((56 - 48) / 2)
    expected = np.asarray(resized.crop((left, top, left + 48, top + 48)))
    assert np.array_equal(pixel_transform((3, 48, 48), 56)(picture).permute(1, 2, 0).numpy(), expected)


def test_normalize_by_hand():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = [(0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    torch.testing.assert_close(normalize(pixels, MEAN, STD).flatten(), torch.tensor(expected))
    assert torch.equal(pixels.flatten(), torch.tensor([0, 51, 255], dtype=torch.uint8))


def test_impossible_choices_are_named():
    with pytest.raises(ValueError, match=r"model\.mean.*3 channels.*have 1"):
        normalize(torch.zeros(1, 4, 4, dtype=torch.uint8), MEAN, STD)
    with pytest.raises(ValueError, match=r"model\.interpolation"):
        pixel_transform((3, 8, 8), 8, "lanczos")
    with pytest.raises(ValueError, match=r"model\.resize"):
        pixel_transform((3, 32, 32), 16)
