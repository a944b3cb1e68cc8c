"""Write the README's result tables from the csv files in `benchmarks/results`.

python benchmarks/readme_tables.py            writes README.md
python benchmarks/readme_tables.py --check    fails if README.md is not what the files say
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->\n", "<!-- end-results -->"
TITLES = {
    "fashion": "The embedded example: ResNet-20 on Fashion-MNIST (10,000 test images)",
    "cifar10": "CIFAR-10, ResNet-20 (10,000 test images)",
    "imagenet1k_sample": "ImageNet networks on 1,000 labelled images (standard error about 1.1 points)",
}
SETTING = ("network", "protocol", "w_bits", "a_bits", "images", "image_count", "pipeline")


def spread(values: list[float]) -> str:
    """Mean, and the sample deviation where there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def order(item: tuple[tuple[str, ...], list[dict[str, str]]]) -> tuple[Any, ...]:
    """Networks and protocols together, widest bits first."""
    network, protocol, w, a, images, count, pipeline = item[0]
    return network, protocol, -int(w), -int(a), pipeline, images, int(count)


def table(name: str) -> list[str]:
    """Lines of one results file: a row a setting, over its seeds."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    lines = [f"**{TITLES[name]}**", ""]
    lines.append("| network | protocol | bits | images | reconstruction | seeds | float | nearest | top-1 |")
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for (network, protocol, w, a, images, count, pipeline), group in sorted(groups.items(), key=order):
        scores = [spread([float(row[key]) for row in group]) for key in ("float_top1", "nearest_top1", "top1")]
        scores[0] = scores[0].split(" ")[0]
        cells = [network, protocol, f"W{w}A{a}", f"{count} {images}", pipeline, str(len(group)), *scores]
        lines.append(f"| {' | '.join(cells)} |")
    made = sorted({(row["date"], row["machine"]) for row in rows})
    lines += ["", f"`benchmarks/results/{name}.csv`, made on " + "; ".join(f"{d} ({m})" for d, m in made) + ".", ""]
    return lines


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    lines = [line for name in TITLES if (RESULTS / f"{name}.csv").exists() for line in table(name)]
    text = README.read_text()
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    wanted = before + BEGIN + "\n".join(lines) + END + after
    if options.check and wanted != text:
        sys.exit("README.md: its tables are not those of benchmarks/results; run python benchmarks/readme_tables.py")
    if not options.check:
        README.write_text(wanted)


if __name__ == "__main__":
    main()
