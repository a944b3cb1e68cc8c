"""A picture of what synthesis aims at: per layer the target deviations, and the slack that gaps may use for nothing."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from deployment.whole_file import whole_file
from lightning_modules.bn_alignment import BNAlignmentModule


def save_targets(alignment: BNAlignmentModule, path: Path) -> Path:
    """Draw, for each layer, root mean square target and largest slack of means and of spreads; returns its path."""
    rows = [part.split(alignment.sizes) for part in alignment.found_targets()]
    layers = len(alignment.layers)
    figure = Figure(figsize=(max(6.0, 0.3 * layers), 5.0), layout="constrained")
    for axis, target, slack, title in zip(
        figure.subplots(2, 1, sharex=True), rows[:2], rows[2:], ("mean", f"{alignment.probe.moment}"), strict=True
    ):
        axis.plot([float(t.square().mean().sqrt()) for t in target[:layers]], "o-", label="target, root mean square")
        largest = [float(t.max()) for t in slack[:layers]]
        if any(largest):
            axis.bar(range(layers), largest, color="tab:orange", alpha=0.5, label="slack")
        axis.set_ylabel(title)
        axis.legend()
    axis.set_xticks(range(layers), alignment.layers, rotation=90, fontsize=7)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
