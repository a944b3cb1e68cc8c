"""Synthetic images are stored under what they depend on: the student too, where the synthesis compares with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from run import run_job
from tests.configuration import SMALL, composed

QUICK = (*SMALL, "reconstruction=none", "weight=nearest", "activation=fixed")


@pytest.mark.parametrize(("generator", "shared"), [("deepinversion", True), ("adaptive_deepinversion", False)])
def test_widths_share_images_that_do_not_depend_on_the_student(generator: str, shared: bool, tmp_path: Path) -> None:
    names = []
    for bits in ("w4a4", "w2a4"):
        folder = tmp_path / bits
        run_job(composed([*QUICK, f"generator={generator}", "generator.batch_size=4", f"bits={bits}"], folder))
        names.append(json.loads((folder / "record.json").read_text())["stored_images"])
    assert (names[0] == names[1]) is shared
