"""Reconstruction that was stopped, once or several times: the same student as an undisturbed one, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from callbacks.checkpoint import StageCheckpoint
from lightning_modules.job import SAFE_LOADING
from lightning_modules.reconstruction import build_reconstruction
from quantizers.layer import sites
from tests.lightning_modules.reconstruction_runs import OBJECTIVES, SETTINGS, KillAndWatch, learn, same, trainer_of
from tests.reconstruction.students import images, resnet8, student_of


@pytest.mark.parametrize(
    ("phases", "kill", "objective"),
    [
        *(("joint", kill, "mse") for kill in (3, 5, 25)),
        *(("weights_then_activations", kill, "mse") for kill in (8, 25, 28, 45)),
        *(("joint", kill, "fisher") for kill in (8, 10, 25)),
        ("weights_then_activations", 28, "fisher"),
        ("joint", 8, "pd"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, phases: str, kill: int, objective: str) -> None:
    x = images(10)
    arguments: dict[str, Any] = {"phases": phases, "activation_iterations": 5, "holdout": 0.2}
    arguments |= {"objective": OBJECTIVES[objective], "bias_lr": 1e-3}
    arguments |= {"drop": 0.5 if phases == "joint" else 0.0}
    whole = student_of(resnet8(), x)
    uninterrupted = KillAndWatch(None, kill + 1)
    expected = learn(whole, x, trainer={"callbacks": [uninterrupted]}, **arguments)

    killed = student_of(resnet8(), x)
    with pytest.raises(InterruptedError):
        learn(killed, x, trainer={"callbacks": [KillAndWatch(kill, -1, tmp_path / "last.ckpt")]}, **arguments)
    assert all(site.enabled and not site.training for _, site in sites(killed.student))

    resumed = student_of(resnet8(), x)
    module, datamodule = build_reconstruction(conversion=resumed, images=x, **(SETTINGS | arguments))
    after = KillAndWatch(None, kill + 1)
    trainer = trainer_of(module, callbacks=[after])
    trainer.fit(module, datamodule=datamodule, ckpt_path=tmp_path / "last.ckpt", **SAFE_LOADING)
    assert same(resumed.student, whole.student)
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in m.results] for m in (module, expected)]
    assert rows[0] == rows[1]
    assert len(after.seen) == len(uninterrupted.seen)
    assert bool(after.seen) == (kill < module.total_steps)
    assert all(torch.equal(a, b) for a, b in zip(after.seen, uninterrupted.seen, strict=True))


class SaveAndKill(StageCheckpoint):
    """Write the stage's checkpoint after step `kill`, and raise."""

    def __init__(self, kill: int | None, folder: Path) -> None:
        super().__init__(str(folder))
        self.kill = kill

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.kill:
            self.save(trainer, pl_module)
            raise InterruptedError("killed")


@pytest.mark.parametrize("kills", [(2, 3), (4, 6), (1, 2, 3), (8, 9)])
def test_killed_again_after_it_was_resumed_equals_uninterrupted(tmp_path: Path, kills: Sequence[int]) -> None:
    x, short = images(10), {"iterations": 2, "drop": 0.5}
    whole = student_of(resnet8(), x)
    expected = learn(whole, x, **short)
    assert expected.total_steps == 10  # an epoch of two steps for each of five units
    checkpoint = tmp_path / "reconstruction.ckpt"
    for kill in (*kills, None):
        conversion = student_of(resnet8(), x)
        module, datamodule = build_reconstruction(conversion=conversion, images=x, **(SETTINGS | short))
        trainer = trainer_of(module, callbacks=[SaveAndKill(kill, tmp_path)])
        resumed = {"ckpt_path": checkpoint, **SAFE_LOADING} if checkpoint.exists() else {}
        with pytest.raises(InterruptedError) if kill else nullcontext():
            trainer.fit(module, datamodule=datamodule, **resumed)
    assert same(conversion.student, whole.student)
