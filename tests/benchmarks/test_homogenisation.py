"""The homogenisation benchmark: images as `run.py` makes and stores them, a row for each set and layer, a picture."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from benchmarks import homogenisation

GENERATORS = ("noise", "adaptive_deepinversion")  # the second needs a student


def test_scores_every_set_and_takes_images_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homogenisation, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(homogenisation, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setenv("CALIBRANT_STORE", str(tmp_path / "store"))
    overrides = ["model=tiny", "calibration.count=8", "generator.steps=2", "generator.batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["homogenisation.py", "--generators", *GENERATORS, "--", *overrides])
    homogenisation.main()
    with (tmp_path / "results" / "homogenisation_tiny.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sets = list(dict.fromkeys(row["images"] for row in rows))
    assert sets == ["real", *GENERATORS]
    layers = [row["layer"] for row in rows if row["images"] == "real"]
    assert layers[-1] == "input"
    assert len(rows) == len(sets) * len(layers)
    assert all(torch.tensor(float(row[key])).isfinite() for row in rows for key in ("mean_spread", "similarity"))
    assert {row["image_count"] for row in rows} == {"8"}
    with Image.open(tmp_path / "results" / "homogenisation_tiny.png") as picture:
        assert picture.format == "PNG"

    monkeypatch.setattr(pl.Trainer, "fit", lambda *arguments, **named: pytest.fail("made again"))
    assert list(homogenisation.image_sets(["adaptive_deepinversion"], overrides)) == ["real", "adaptive_deepinversion"]
    assert not list(tmp_path.glob("outputs/**/*.ckpt"))
