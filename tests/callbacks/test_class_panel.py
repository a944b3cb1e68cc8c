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
from callbacks.wandb_run import WandbRun
from tests.callbacks.offline_runs import read_runs


class Painter:
    has_panel = True

    def panel(self, columns: int) -> Tensor:
        return torch.linspace(-1, 1, 3).repeat_interleave(columns).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def watched(callback: ClassPanel, module: Any, epochs: int = 7, loggers: tuple[Any, ...] = ()) -> None:
    for epoch in range(epochs):
        trainer: Any = SimpleNamespace(
            current_epoch=epoch, max_epochs=epochs, is_global_zero=True, loggers=loggers, global_step=10 * epoch
        )
        callback.on_train_epoch_end(trainer, module)


def test_every_third_and_the_last_epoch_have_a_picture_of_a_row_a_class(tmp_path: Path) -> None:
    watched(ClassPanel(str(tmp_path), mean=[0.5], std=[0.5], every_epochs=3, columns=2), Painter())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0003.png", "epoch_0006.png", "epoch_0007.png"]
    with Image.open(tmp_path / "epoch_0007.png") as picture:
        width, height = picture.size
        grey = [picture.convert("L").getpixel((width // 4, int(height * (row + 0.5) / 3))) for row in range(3)]
    assert height > width
    assert grey == [0, 128, 255]


def test_pictures_are_shown_in_wandb_at_their_step(tmp_path: Path) -> None:
    logger = WandbRun("calibrant", str(tmp_path / "run"), offline=True)
    watched(ClassPanel(str(tmp_path / "panel"), mean=[0.5], std=[0.5], every_epochs=4), Painter(), loggers=(logger,))
    logger.conclude(tmp_path, {"status": "finished"})
    (run,) = read_runs(tmp_path)
    shown = run.series("distillation/classes")
    assert [step for step, _ in shown] == [30, 60]
    for (_, picture), name in zip(shown, ("epoch_0004.png", "epoch_0007.png"), strict=True):
        assert (run.folder / "files" / picture["filenames"][0]).read_bytes() == (tmp_path / "panel" / name).read_bytes()


def test_other_modules_are_left_alone(tmp_path: Path) -> None:
    watched(ClassPanel(str(tmp_path), mean=[0.5], std=[0.5]), SimpleNamespace())
    assert not list(tmp_path.iterdir())


def test_bad_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_epochs, columns: expected at least 1, got 0 and 8"):
        ClassPanel(str(tmp_path), mean=[0.5], std=[0.5], every_epochs=0)
