"""The picture of an allocation."""

from __future__ import annotations

from pathlib import Path

from callbacks.allocation_plot import save_allocation


def test_a_picture_is_drawn_also_where_sides_stay_float(tmp_path: Path) -> None:
    rows = [
        {"group": "conv1", "weight": 4, "activation": 32, "sensitivity": 0.1, "deviation": 0.01},
        {"group": "fc", "weight": 32, "activation": 32, "sensitivity": 0.0, "deviation": 0.0},
    ]
    path = save_allocation(rows, tmp_path / "deep" / "allocation.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]
