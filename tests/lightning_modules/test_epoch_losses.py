"""Means of an epoch against plain ones, and what of the student is kept."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.epoch_losses import GENERATOR, STUDENT, EpochLosses
from lightning_modules.turns import Turns


def test_against_plain_means() -> None:
    losses, steps = EpochLosses(), torch.tensor([[3.0, 1.0], [2.0, 4.0], [6.0, 5.0]])  # of the student, three epochs
    reported = []
    for epoch, row in enumerate(steps):
        losses.open()
        for loss in row:
            losses.add(GENERATOR, 2 * loss)
            losses.add(STUDENT, loss)
        reported.append(losses.close(epoch, Turns(epochs=3, steps=2)))
    assert [float(values["student/epoch_loss"]) for values in reported] == steps.mean(1).tolist()
    assert [float(values["generator/epoch_loss"]) for values in reported] == (2 * steps.mean(1)).tolist()
    assert [int(values["student/best_epoch"]) for values in reported] == [0, 0, 0]
    assert losses.facts(2) == {
        "loss_first_epoch": 2.0, "loss_last_epoch": 5.5, "best_loss_epoch": 0, "best_loss": 2.0,
    }  # fmt: skip


def test_a_warm_up_says_nothing_of_the_student() -> None:
    losses = EpochLosses()
    losses.add(GENERATOR, torch.tensor(1.0))
    assert set(losses.close(0, Turns(epochs=2, warmup=1, steps=1))) == {"generator/epoch_loss"}
    assert losses.best.tolist() == [torch.inf, -1.0]


def test_a_loss_that_is_not_finite_names_its_epoch() -> None:
    losses = EpochLosses()
    losses.add(STUDENT, torch.tensor(torch.nan))
    with pytest.raises(RuntimeError, match=r"epoch 3, got 0.0 of the generator and nan of the student"):
        losses.close(3, Turns(epochs=4, steps=1))
