"""What the training script does to images, against loops; training itself takes an hour."""

from __future__ import annotations

import torch

from benchmarks.train_teacher import CROP_PADDING, MEAN, STD, augment, erase


def images(count: int = 400) -> torch.Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0)) + 10


def test_augmented_images_are_crops_of_padded_ones_perhaps_flipped() -> None:
    original = images(20)
    seen = augment(original, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(original, (CROP_PADDING,) * 4, value=-MEAN / STD)
    for before, after in zip(padded, seen, strict=True):
        crops = [
            before[:, top : top + 28, left : left + 28]
            for top in range(2 * CROP_PADDING + 1)
            for left in range(2 * CROP_PADDING + 1)
        ]
        assert any(torch.equal(after, crop) or torch.equal(after, crop.flip(2)) for crop in crops)
    assert torch.equal(seen, augment(original, torch.Generator().manual_seed(1)))


def test_one_rectangle_of_half_of_the_images_is_erased() -> None:
    blank = erase(images(), torch.Generator().manual_seed(1)) == 0
    touched = blank.flatten(1).any(1)
    assert 0.4 < touched.float().mean() < 0.6
    for mask in blank[touched][:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a rectangle
        assert mask.sum() == len(rows) * len(columns)
        assert 0 < mask.float().mean() <= 0.25 + 2 / 28
