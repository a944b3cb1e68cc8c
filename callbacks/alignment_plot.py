"""Image sets side by side, as DSG's figures show them: pictures, statistics around the stored ones, likeness.

Zhang et al., "Diversifying Sample Generation for Accurate Data-Free Quantization", CVPR 2021,
arXiv 2103.01049, figures 1 to 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torchvision.utils import make_grid

from callbacks.sample_grid import denormalise
from deployment.whole_file import whole_file
from lightning_modules.bn_alignment import BNAlignmentModule, images_of


class AlignmentPlot(Callback):
    """Draws one picture of all sets that `Trainer.validate(BNAlignmentModule, loaders)` has scored; only watches.

    Args:
        names: of the sets, in the order of the loaders.
        path: of the PNG.
        mean: of the teacher's normalisation, for the pictures.
        std: the same.
        shown: images of each set in the picture.
    """

    def __init__(
        self, names: Sequence[str], path: Path, *, mean: Sequence[float], std: Sequence[float], shown: int = 16
    ) -> None:
        self.names = list(names)
        self.path = Path(path)
        self.mean = mean
        self.std = std
        self.shown = shown
        self.images: dict[int, list[Tensor]] = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        kept = self.images.setdefault(dataloader_idx, [])
        missing = self.shown - sum(len(part) for part in kept)
        if missing > 0:
            kept.append(images_of(batch)[:missing].detach().float().cpu())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, BNAlignmentModule)
        sets = len(pl_module.diversities)
        figure: Any = Figure(figsize=(3.2 * max(sets, 3), 9.0), layout="constrained")
        pictures, lower = figure.subfigures(2, 1, height_ratios=(1.0, 1.6))
        for axis, index in zip(_row(pictures, sets), range(sets), strict=True):
            self._picture(axis, index)
        cloud, lines, likeness = _row(lower, 3)
        for index, diversity in pl_module.diversities.items():
            name, rows = self.names[index], diversity.compute()
            mean, std = (torch.cat(column) for column in zip(*diversity.cloud, strict=True))
            cloud.scatter(mean, std, s=6, alpha=0.6, label=name)
            lines.plot([row.mean_spread for row in rows], label=name)
            likeness.plot(
                [row.similarity for row in rows], label=f"{name} ({diversity.feature_similarity():.2f} at the end)"
            )
        for axis, title, x, y in (
            (cloud, "samples around the stored statistics", "mean gap / sigma", "deviation gap / sigma"),
            (lines, "spread of samples' means", "layer", "in stored deviations"),
            (likeness, "likeness of samples", "layer", "mean cosine of statistics"),
        ):
            axis.set(title=title, xlabel=x, ylabel=y)
            axis.legend(fontsize=7)
        with whole_file(self.path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)

    def _picture(self, axis: Axes, index: int) -> None:
        images = denormalise(torch.cat(self.images[index]), self.mean, self.std)
        grid = make_grid(images, nrow=max(1, round(len(images) ** 0.5)), padding=1, pad_value=1.0)
        axis.imshow(grid.permute(1, 2, 0).numpy())
        axis.set_title(self.names[index])
        axis.axis("off")


def _row(figure: Any, count: int) -> list[Axes]:
    return list(np.ravel(figure.subplots(1, count)))
