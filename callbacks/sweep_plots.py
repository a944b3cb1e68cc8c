"""Two pictures of a sweep: accuracy against size with the settings that nothing beats, and methods against widths."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from callbacks.sweep_results import Setting
from deployment.whole_file import whole_file

WIDTH = 5.2  # inches; drawn so small that a telephone need hardly shrink it
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#4fa3d1", "#777777")  # told apart by all eyes
BRIGHT = ("#58b5f0", "#ff9248", "#2fd6a3", "#f0a3cd", "#f2c14b", "#a8d8f5", "#b0b8c0")
MARKERS = "osD^vP*X"
GAP = 0.4  # of a row's height
LONGEST = 34  # characters of a label


def _style(ink: str, frame: str) -> dict[Any, Any]:
    return {
        "axes.edgecolor": frame,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "text.color": ink,
        "font.size": 11.0,
        "legend.fontsize": 11.0,
    }


PAPER, NIGHT = _style("#1b1f24", "#57606a"), _style("#e6e9ed", "#9aa4b0")


def pareto(settings: Sequence[Setting], *, night: bool = False) -> Figure | None:
    """Top-1 against KiB of weights, a mark a setting with its deviation over seeds; None where nothing has a size."""
    drawn = [setting for setting in settings if setting.kib is not None and setting.metrics("quantized")]
    if not drawn:
        return None
    methods = list(dict.fromkeys(setting.method for setting in drawn))
    with mpl.rc_context(NIGHT if night else PAPER):
        figure = Figure(figsize=(WIDTH, 3.9 + 0.22 * min(len(methods), 24)), layout="constrained")
        axis = figure.subplots()
        for number, method in enumerate(methods):
            group = sorted((s for s in drawn if s.method == method), key=lambda s: s.kib or 0.0)
            tops = [s.metrics("quantized") for s in group]
            axis.errorbar(
                [s.kib or 0.0 for s in group],
                [statistics.mean(top) for top in tops],
                yerr=[statistics.stdev(top) if len(top) > 1 else 0.0 for top in tops],
                fmt=MARKERS[number % len(MARKERS)],
                color=(BRIGHT if night else COLOURS)[number % len(COLOURS)],
                capsize=3,
                label=shortened(method),
            )
        best = front(drawn)
        if len(best) > 1:
            places = [(s.kib or 0.0, statistics.mean(s.metrics("quantized"))) for s in best]
            ink = mpl.rcParams["text.color"]
            axis.step(*zip(*places, strict=True), where="post", color=ink, lw=1, ls=":", label="beaten by none")
        _note_float(axis, drawn)
        axis.set_xlabel("size of the quantized weights (KiB)")
        axis.set_ylabel("top-1 (%)")
        axis.grid(alpha=0.25)
        figure.legend(loc="outside lower left", frameon=False, ncols=1)
    return figure


def _note_float(axis: Axes, drawn: Sequence[Setting]) -> None:
    floats = sorted({round(value, 2) for setting in drawn for value in setting.metrics("float")})
    if len(floats) == 1:
        axis.axhline(floats[0], color="#888888", lw=1, label=f"float, {floats[0]:.2f} %")


def front(settings: Sequence[Setting]) -> list[Setting]:
    """The settings that no other one beats: none is as small and more accurate, or smaller and as accurate."""
    ranked = sorted(settings, key=lambda s: (s.kib or 0.0, -statistics.mean(s.metrics("quantized"))))
    best: list[Setting] = []
    for setting in ranked:
        if not best or statistics.mean(setting.metrics("quantized")) > statistics.mean(best[-1].metrics("quantized")):
            best.append(setting)
    return best


def heat_map(settings: Sequence[Setting], *, night: bool = False) -> Figure | None:
    """Mean top-1, a row a method and a column a pair of widths; None where there is not even one of two of them."""
    drawn = [setting for setting in settings if setting.metrics("quantized")]
    methods = list(dict.fromkeys(setting.method for setting in drawn))
    columns = {s.widths: s.average_widths for s in drawn}
    widths = sorted(columns, key=lambda name: columns[name], reverse=True)
    if len(methods) * len(widths) < 2:
        return None
    found: dict[tuple[str, str], list[float]] = {}
    for setting in drawn:
        found.setdefault((setting.method, setting.widths), []).extend(setting.metrics("quantized"))
    cells = [[statistics.mean(found.get((method, width), [float("nan")])) for width in widths] for method in methods]
    with mpl.rc_context(NIGHT if night else PAPER):
        figure = Figure(figsize=(max(WIDTH, 0.8 * len(widths)), 1.3 + 0.85 * len(methods)), layout="constrained")
        axis = figure.subplots()
        edges = [edge for row in range(len(methods)) for edge in (row, row + GAP)] + [len(methods)]
        empty = [float("nan")] * len(widths)  # a strip above each row for its method, which would not fit beside it
        rows = [line for cell in cells for line in (empty, cell)]
        image = axis.pcolormesh([i - 0.5 for i in range(len(widths) + 1)], edges, rows, cmap="viridis")
        low, high = image.get_clim()
        for row, line in enumerate(cells):
            axis.text(-0.5, row + GAP - 0.06, shortened(methods[row], 60), ha="left", va="bottom", fontsize=11)
            for column, value in enumerate(line):
                if value == value:  # not the NaN of a missing combination
                    ink = "white" if high > low and value < (low + high) / 2 else "black"
                    axis.text(column, row + (1 + GAP) / 2, f"{value:.2f}", ha="center", va="center", color=ink)
        axis.invert_yaxis()
        axis.set_xticks(range(len(widths)), widths)
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        axis.set_xlabel("bits of weights (W) and activations (A)")
        figure.colorbar(image, ax=axis, label="top-1 (%)")
    return figure


def shortened(text: str, longest: int = LONGEST) -> str:
    """A label that leaves the plot its room."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def as_svg(figure: Figure) -> bytes:
    """The figure as a drawing whose letters are outlines, so that it needs no font, on nothing."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "calibrant"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure, by a temporary name and a rename."""
    with whole_file(path, several=True) as temporary:
        figure.savefig(temporary, format="png", dpi=144, facecolor="white")
    return path
