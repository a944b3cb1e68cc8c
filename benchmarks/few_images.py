"""Draw accuracy against the number of calibration images from `benchmarks/results/few_images_<network>.csv`.

python -m benchmarks.few_images                 writes few_images_cifar10.png beside it
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.table import RESULTS, read_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Curve = dict[int, list[float]]  # top-1 of every seed, by number of images


def method(row: dict[str, str]) -> str:
    """What a row learned and over what: `adaround, layer`."""
    settings = dict(setting.split("=", 1) for setting in row["changes"].split())
    return f"{row['weight']}, {settings.get('reconstruction.granularity', 'block')}"


def curves(rows: list[dict[str, str]]) -> dict[tuple[str, str], Curve]:
    """Top-1 by (method, images) and number of images."""
    found: dict[tuple[str, str], Curve] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[method(row), row["images"]][int(row["image_count"])].append(float(row["top1"]))
    return {key: dict(sorted(curve.items())) for key, curve in sorted(found.items())}


def draw(found: dict[tuple[str, str], Curve], path: Path, title: str) -> None:
    """One line a method; real images solid, synthetic ones dashed; bars are the deviation over seeds."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    methods = list(dict.fromkeys(name for name, _ in found))
    for (name, images), curve in found.items():
        counts = list(curve)
        means = [statistics.mean(values) for values in curve.values()]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]
        style: dict[str, Any] = {"color": f"C{methods.index(name)}", "linestyle": "-" if images == "real" else "--"}
        axes.errorbar(counts, means, spread, marker="o", markersize=3, label=f"{name}, {images}", **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := sorted({n for curve in found.values() for n in curve}), [str(n) for n in ticks])
    axes.set(xlabel="calibration images", ylabel="top-1 in per cent", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Read, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="few_images_cifar10", help="benchmarks/results/<name>.csv is read")
    name = parser.parse_args().name
    rows = read_rows(RESULTS / f"{name}.csv")
    if not rows:
        raise SystemExit(f"no rows in {name}.csv; make it first: python benchmarks/table.py {name} --plan -- ...")
    first = rows[0]
    title = f"{first['network']}, W{first['w_bits']}A{first['a_bits']}, {first['iterations']} steps a unit"
    draw(curves(rows), RESULTS / f"{name}.png", title)
    print(f"{len(rows)} rows -> {(RESULTS / f'{name}.png').name}")


if __name__ == "__main__":
    main()
