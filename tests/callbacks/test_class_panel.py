"""Pictures come every few epochs and at the end, of modules that have a panel."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from callbacks.class_panel import ClassPanel


class Painter:
    has_panel = True

    def panel(self, columns: int) -> Tensor:
        return torch.linspace(-1, 1, 3).repeat_interleave(columns).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def watched(callback: ClassPanel, module: Any, epochs: int = 7) -> None:
    for epoch in range(epochs):
        trainer: Any = SimpleNamespace(current_epoch=epoch, max_epochs=epochs, is_global_zero=True, loggers=[])
        callback.on_train_epoch_end(trainer, module)


def test_every_third_and_the_last_epoch_have_a_picture_of_a_row_a_class(tmp_path: Path) -> None:
    watched(ClassPanel(str(tmp_path), mean=[0.5], std=[0.5], every_epochs=3, columns=2), Painter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0003.png", "epoch_0006.png", "epoch_0007.png"]
    with Image.open(tmp_path / "epoch_0007.png") as picture:
        width, height = picture.size
        grey = [picture.convert("L").getpixel((width // 4, int(height * (row + 0.5) / 3))) for row in range(3)]
    assert height > width
    assert grey == [0, 128, 255]


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    watched(ClassPanel(str(tmp_path), mean=[0.5], std=[0.5]), SimpleNamespace())
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_epochs, columns: expected at least 1, got 0 and 8"):
        ClassPanel(str(tmp_path), mean=[0.5], std=[0.5], every_epochs=0)
