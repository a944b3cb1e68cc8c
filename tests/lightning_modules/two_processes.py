"""Reconstructs in as many processes as asked for and saves the student; run by the test of that name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_modules.reconstruction import build_reconstruction
from tests.reconstruction.students import images, resnet8, student_of


def main(folder: Path, processes: int) -> None:
    """Write `<processes>-<rank>.pt`."""
    x = images(10)
    conversion = student_of(resnet8(), x)
    module, datamodule = build_reconstruction(
        conversion=conversion, images=x, seed=3, iterations=3, batch_size=4, drop=0.0, regularizer_weight=0.1
    )
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    strategy = "ddp_find_unused_parameters_true" if processes > 1 else "auto"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        enable_model_summary=False,
        **quiet,
        **module.trainer_arguments(),
    )
    trainer.fit(module, datamodule=datamodule)
    torch.save(conversion.student.state_dict(), folder / f"{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
