"""A picture of an allocation: bits of each group of layers, and beneath them what each costs in sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from deployment.whole_file import whole_file

FLOAT = 32  # bits: not drawn


def save_allocation(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the chosen option of every group, in order of execution; returns the path.

    Args:
        rows: with `group`, `weight`, `activation` (bits), `sensitivity` and its `deviation`.
        path: of the png.
    """
    figure = Figure(figsize=(max(6.0, 0.3 * len(rows)), 5.0), layout="constrained")
    bits, harm = figure.subplots(2, 1, sharex=True)
    places = range(len(rows))
    bits.bar(places, [row["weight"] if row["weight"] != FLOAT else 0 for row in rows], label="weights")
    activations = [(i, row["activation"]) for i, row in enumerate(rows) if row["activation"] != FLOAT]
    if activations:
        bits.plot(*zip(*activations, strict=True), "o", color="tab:orange", label="activations")
    bits.set_ylabel("bits")
    bits.legend()
    harm.bar(places, [row["sensitivity"] for row in rows], yerr=[row["deviation"] for row in rows], color="tab:red")
    harm.set_ylabel("sensitivity")
    harm.set_xticks(places, [row["group"] for row in rows], rotation=90, fontsize=7)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
