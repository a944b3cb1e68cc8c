"""Write the result tables of README.md and docs/results.md from the csv files in `benchmarks/results`.

python benchmarks/readme_tables.py            writes both
python benchmarks/readme_tables.py --check    fails if one is not what the files say
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->\n", "<!-- end-results -->"
TABLES = {  # by document and results file
    "README.md": {
        "fashion": "The embedded example: ResNet-20 on Fashion-MNIST (10,000 test images)",
        "cifar10": "CIFAR-10, ResNet-20 (10,000 test images)",
        "imagenet1k_sample": "ImageNet networks on 1,000 labelled images (standard error about 1.1 points)",
    },
    "docs/results.md": {
        "synthesis_cifar10": "Every way of making images, CIFAR-10, ResNet-20 (10,000 test images)",
        "bn_free": "Networks without BatchNorm, range calibration alone (10,000 test images)",
        "calibrant_ablation": "What composes: `generator=calibrant` with one part changed, and pixels (CIFAR-10, W3A3)",
    },
}
# What tells settings apart. Files from before a column was there lack it: then it stays empty.
SETTING = (
    "network", "protocol", "w_bits", "a_bits", "images", "image_count", "generator_steps", "weight", "activation",
    "pipeline", "iterations", "corrections", "changes",
)  # fmt: skip
SHOWN = {"generator.steps": "generator_steps", "reconstruction.iterations": "iterations"}  # settings with a place


def spread(values: list[float]) -> str:
    """Mean, and the sample deviation where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def order(item: tuple[tuple[str, ...], list[dict[str, str]]]) -> tuple[Any, ...]:
    """Networks and protocols together, widest bits first."""
    row = dict(zip(SETTING, item[0], strict=True))
    first = row["network"], row["protocol"], -int(row["w_bits"]), -int(row["a_bits"]), row["pipeline"]
    return *first, row["images"], int(row["image_count"]), item[0]


def cells(row: dict[str, str]) -> list[str]:
    """How a setting is told: network, protocol, bits, images, quantizers, reconstruction, each with its length."""
    images = f"{row['image_count']} {row['images']}"
    if row["generator_steps"] not in ("", "0"):
        images += f", {row['generator_steps']} steps"
    told = [key for key, column in SHOWN.items() if row[column]]
    others = [setting for setting in row["changes"].split() if setting.split("=")[0] not in told]
    if others:
        images += f", `{' '.join(others)}`"
    pipeline = row["pipeline"]
    if pipeline != "none" and row["iterations"]:
        pipeline += f", {row['iterations']} its"
    if row["corrections"] not in ("", "none"):
        pipeline += f", {row['corrections']}"
    quantizers = ", ".join(part for part in (row["weight"], row["activation"]) if part)
    return [row["network"], row["protocol"], f"W{row['w_bits']}A{row['a_bits']}", images, quantizers, pipeline]


def table(name: str, title: str) -> list[str]:
    """Lines of one results file: a row a setting, over its seeds."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) or "" for key in SETTING), []).append(row)
    lines = [f"**{title}**", ""]
    lines.append(
        "| network | protocol | bits | images | quantizers | reconstruction | seeds | float | nearest | top-1 |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for setting, group in sorted(groups.items(), key=order):
        scores = [spread([float(row[key]) for row in group]) for key in ("float_top1", "nearest_top1", "top1")]
        scores[0] = scores[0].split(" ")[0]
        told = cells(dict(zip(SETTING, setting, strict=True)))
        lines.append(f"| {' | '.join([*told, str(len(group)), *scores])} |")
    made = sorted({(row["date"], row["machine"]) for row in rows})
    lines += ["", f"`benchmarks/results/{name}.csv`, made on " + "; ".join(f"{d} ({m})" for d, m in made) + ".", ""]
    return lines


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for document, titles in TABLES.items():
        path = ROOT / document
        lines = [
            line for name, title in titles.items() if (RESULTS / f"{name}.csv").exists() for line in table(name, title)
        ]
        text = path.read_text()
        before, rest = text.split(BEGIN, 1)
        _, after = rest.split(END, 1)
        wanted = before + BEGIN + "\n".join(lines) + END + after
        if options.check and wanted != text:
            sys.exit(
                f"{document}: its tables are not those of benchmarks/results; run python benchmarks/readme_tables.py"
            )
        if not options.check:
            path.write_text(wanted)


if __name__ == "__main__":
    main()
