"""Learns a student in parallel, alone or with another process, and saves it; run by the test of that name."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_modules.reconstruction import build_reconstruction
from lightning_modules.shared_reconstruction import learn_in_shares, recipe_of
from synthesis.store import SampleStore
from tests.reconstruction.students import images, resnet8, student_of


def main(folder: Path, name: str, shares: int) -> None:
    """Write `<name>.pt`: the student and the names of the units that were learned here."""
    x = images(10)
    conversion = student_of(resnet8(), x)

    def build(**arguments: Any) -> Any:
        settings: dict[str, Any] = {"iterations": 4, "batch_size": 4, "regularizer_weight": 0.1, "seed": 3}
        return build_reconstruction(
            conversion=conversion, images=x, schedule="parallel", granularity="layer", **settings, **arguments
        )

    def fit(module: Any, datamodule: Any) -> None:
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        pl.Trainer(accelerator="cpu", devices=1, **quiet, **module.trainer_arguments()).fit(module, datamodule)

    if shares == 1:
        module, datamodule = build()
        fit(module, datamodule)
        rows = module.results
    else:
        (folder / f"{name}.ready").touch()
        started = time.monotonic()
        while len(list(folder.glob("*.ready"))) < shares:
            assert time.monotonic() - started < 100, "the other process did not begin"
            time.sleep(0.01)
        recipe = recipe_of(conversion, x, {"test": 0})
        rows = learn_in_shares(build, fit, shares=shares, store=SampleStore(folder / "store"), recipe=recipe)
    saved = {"student": conversion.student.state_dict(), "units": [row["unit"] for row in rows]}
    torch.save(saved, folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
