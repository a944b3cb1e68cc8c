"""Write the tables of README.md, docs/results.md and the methods' cards from the csv files in `benchmarks/results`.

python benchmarks/readme_tables.py            writes all
python benchmarks/readme_tables.py --check    fails if one is not what the files say
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

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
        "synthesis_fashion": "Every way of making images on the embedded network (10,000 test images)",
        "bn_free": "Networks without BatchNorm, range calibration alone (10,000 test images)",
        "calibrant_ablation": "What composes: our recipe, one part changed (MobileNetV2: 1,000 test images)",
        "corrections": "Corrections of students without reconstruction (MobileNetV2: 1,000 test images)",
    },
}
PIVOTS = {  # by document and results file: a row a method, a column for each width and kind of images
    "docs/results.md": {
        "calibration_cifar10": "Roundings, granularities and pipelines, CIFAR-10, ResNet-20 (10,000 test images)",
        "calibration_resnet50": "Roundings and pipelines, ResNet-50 (500 test images, standard error about 1.3 points)",
        "ablation_cifar10": "`pipeline=calibrant` and its parts, CIFAR-10, ResNet-20 (10,000 test images)",
        "ablation_resnet50": "`pipeline=calibrant_fast` and its parts, ResNet-50 (1,000 test images)",
    },
}
CARDS = {  # by card: what the column `images` says in rows about it
    "zeroq": ("zeroq",),
    "dsg": ("dsg",),
    "deepinversion": ("deepinversion_cifar",),
    "intraq": ("intraq_cifar10",),
    "genie": ("genie",),
    "hast": ("hast_cifar", "synq_cifar"),
    "gdfq": ("gdfq",),
    "gzsq": ("gzsq",),
    "propagated": ("propagated",),
    "calibrant": ("calibrant", "calibrant_fast"),
    "controls": ("none", "uniform_noise", "noise", "coloured_noise", "real"),
}
CARD_FILES = ("synthesis_cifar10", "bn_free")
PIVOT_CARDS = {  # by document: how the methods that it is about begin in the table of calibration_cifar10
    "docs/methods/adaround.md": ("adaround, block", "adaround, layer"),
    "docs/methods/adaquant.md": ("adaquant", "pipeline advanced"),
    "docs/methods/genie_m.md": ("genie_m", "pipeline genie_m"),
    "docs/methods/flexround.md": ("flexround",),
    "docs/methods/signround.md": ("signround",),
    "docs/methods/squant.md": ("squant", "nearest", "pipeline calibrant_light"),
    "docs/methods/nearest.md": ("nearest",),
    "docs/methods/gptq.md": ("gptq", "nearest"),
    "docs/methods/obq.md": ("obq", "gptq"),
    "docs/methods/merged.md": ("adaround, block", "adaround, merged", "adaround, stage", "adaround, network"),
    "docs/methods/qdrop.md": ("adaround, block", "pipeline qdrop"),
    "docs/methods/brecq.md": ("adaround, block", "adaround, layer", "pipeline brecq"),
    "docs/methods/bn_reestimation.md": ("pipeline light", "pipeline calibrant_light"),
    "docs/pipelines.md": ("pipeline",),
}
# What tells settings apart. Files from before a column was there lack it: then it stays empty.
SETTING = (
    "network", "protocol", "w_bits", "a_bits", "images", "image_count", "generator_steps", "weight", "activation",
    "pipeline", "iterations", "corrections", "changes",
)  # fmt: skip
RATES = ("weight.", "generator.", "activation.", "corrections.bias_tuning.")  # told by the plan, not by the table
ASIDE = (
    "reconstruction.batch_size", "reconstruction.iterations", "reconstruction.rates_stated_for", "data.limit",
    "model.stated_top1",
)  # fmt: skip
PARTS = ("weight", "activation", "pipeline")
CHOICES = {  # by what a pipeline's file says: the column that tells it
    "override /weight": "weight",
    "override /activation": "activation",
    "override /reconstruction": "pipeline",
    "override /corrections": "corrections",
}
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


def rows_of(name: str) -> list[dict[str, str]]:
    """Rows of one results file; none where it has not been made."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def card(images: tuple[str, ...]) -> list[str]:
    """Lines of a card: a row for each network, width and way of quantizing, over its seeds."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in (row for name in CARD_FILES for row in rows_of(name) if row["images"] in images):
        others = [s for s in row["changes"].split() if s.split("=")[0] not in SHOWN]
        told = row["images"] + (f", `{' '.join(others)}`" if others else "")
        way = "ranges alone" if row["pipeline"] == "none" else f"blocks, {row['iterations']} its"
        key = row["network"], -int(row["w_bits"]), -int(row["a_bits"]), way, told
        groups.setdefault(key, []).append(float(row["top1"]))
    lines = ["| network | bits | quantized by | images | seeds | top-1 |", "|---|---|---|---|---|---|"]
    for (network, w, a, way, told), values in sorted(groups.items()):
        lines.append(f"| {network} | W{-w}A{-a} | {way} | {told} | {len(values)} | {spread(values)} |")
    return [*lines, ""] if groups else []


def table(name: str, title: str) -> list[str]:
    """Lines of one results file: a row a setting, over its seeds."""
    rows = rows_of(name)
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) or "" for key in SETTING), []).append(row)
    lines = [f"**{title}**", ""]
    lines.append(
        "| network | protocol | bits | images | quantizers | reconstruction | seeds | float | nearest | top-1 |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for setting, group in sorted(groups.items(), key=order):
        columns = ([row[key] for row in group] for key in ("float_top1", "nearest_top1", "top1"))
        scores = [spread([float(value) for value in column]) if all(column) else "" for column in columns]
        scores[0] = scores[0].split(" ")[0]
        told = cells(dict(zip(SETTING, setting, strict=True)))
        lines.append(f"| {' | '.join([*told, str(len(group)), *scores])} |")
    return [*lines, "", made(name, rows), ""]


def pivoted(name: str, title: str) -> list[str]:
    """Lines of one results file as a pivot table."""
    rows = rows_of(name)
    counts = sorted({int(row["image_count"]) for row in rows})
    seeds = sorted({int(row["seed"]) for row in rows})
    told = f"seed {seeds[0]}" if len(seeds) == 1 else f"deviations over seeds {', '.join(map(str, seeds))}"
    caption = f"{counts[0]} images; {told}."
    lines = pivot(rows, part_changed if name.startswith("ablation") else method)
    return [f"**{title}**", "", *lines, "", caption, made(name, rows), ""]


def made(name: str, rows: list[dict[str, str]]) -> str:
    """When and on what the rows of a file were made."""
    places = sorted({(row["date"], row["machine"]) for row in rows})
    return f"`benchmarks/results/{name}.csv`, made on " + "; ".join(f"{d} ({m})" for d, m in places) + "."


def method(row: dict[str, str]) -> str:
    """A pipeline's name, or rounding and what it is learned over, then every other setting that tells rows apart."""
    settings = dict(setting.split("=", 1) for setting in row["changes"].split())
    settings = {key: value for key, value in settings.items() if not key.startswith(RATES) and key not in ASIDE}
    if row["recipe"] not in ("", "none"):
        own = own_choices(row["recipe"])
        parts = [f"pipeline {row['recipe']}", *(row[key] for key in PARTS if row[key] != own[key])]
        asked = {setting.split("=", 1)[0] for setting in row["overrides"].split()}
        settings = {key: value for key, value in settings.items() if key in asked}  # the others are the recipe's own
        parts += [text for text in row["overrides"].split() if "/" in text.split("=")[0]]
        corrected, meant = (found["corrections"] not in ("", "none") for found in (row, own))
        if corrected != meant:
            parts.append(row["corrections"] if corrected else "without corrections")
    else:
        parts = [row["weight"]]
        if row["pipeline"] == "fast":
            parts.append(settings.pop("reconstruction.granularity", "block"))
    told = {"reconstruction.drop=0.0": "no drop", "reconstruction.schedule=parallel": "parallel"}
    return ", ".join(parts + [told.get(text, text) for text in (f"{k}={v}" for k, v in sorted(settings.items()))])


@functools.cache
def own_choices(recipe: str) -> dict[str, Any]:
    """What a pipeline chooses for the columns `weight`, `activation`, `pipeline` and `corrections`."""
    found: dict[str, Any] = {}
    for entry in OmegaConf.load(ROOT / "conf" / "pipeline" / f"{recipe}.yaml").defaults:
        if isinstance(entry, str):
            found |= own_choices(entry) if entry != "_self_" else {}
        else:
            found |= {CHOICES[key]: option for key, option in entry.items()}
    return found


def part_changed(row: dict[str, str]) -> str:
    """Of one pipeline in variations: rounding, reconstruction and its length, and what else was asked for."""
    told_otherwise = (*ASIDE, "reconstruction.bias_lr", "activation.relative")
    asked = [s for s in row["overrides"].split() if s.split("=")[0] not in told_otherwise]
    told = {"reconstruction.drop=0.0": "no drop"}
    others = [value for value, own in ((row["activation"], "lsq"), (row["corrections"], "none")) if value != own]
    names = [told.get(text, text.removeprefix("reconstruction.").removeprefix("reconstruction/")) for text in asked]
    biases = ["biases"] if "reconstruction.bias_lr=" in row["changes"] else []
    rates = [] if "activation.relative=True" in row["changes"] else ["absolute rates"]
    length = f"{row['iterations']} steps"
    return ", ".join([row["weight"], row["pipeline"], length, *biases, *rates, *others, *sorted(names)])


def pivot_card(lines: list[str], methods: tuple[str, ...]) -> list[str]:
    """Lines of a card: the rows of these methods as they stand in the table of all, whose best is bold."""
    return [*lines[:2], *(line for line in lines[2:] if line.removeprefix("| ").startswith(methods)), ""]


def pivot(rows: list[dict[str, str]], name_of: Callable[[dict[str, str]], str] = method) -> list[str]:
    """Lines of markdown: mean top-1 with its deviation over seeds, the best of a column bold, and median seconds.

    Seconds of another machine than the one that most rows are from would be taken for another method's cost.
    """
    usual = statistics.mode(row["machine"] for row in rows)
    kinds = sorted({row["images"] for row in rows}, key=lambda kind: kind == "real")
    widths = sorted(
        {(int(row["w_bits"]), int(row["a_bits"])) for row in rows}, key=lambda wide: (-wide[0] * wide[1], wide)
    )
    columns = [(w, a, kind) for w, a in widths for kind in kinds]
    cells: dict[tuple[str, Any], list[dict[str, str]]] = {}
    for row in rows:
        column = int(row["w_bits"]), int(row["a_bits"]), row["images"]
        cells.setdefault((name_of(row), column), []).append(row)
    best: dict[Any, float] = {}
    for (_, column), found in cells.items():
        best[column] = max(best.get(column, 0.0), mean_of(found, "top1"))
    diverging = all(row.get("kl") for row in rows)  # where only some rows have it, it compares nothing
    heads = [f"W{w}A{a} {kind}" for w, a, kind in columns]
    lines = [f"| method | {' | '.join(heads)} | seconds |", "|---" * (len(heads) + 2) + "|"]
    for name in sorted({name for name, _ in cells}):
        of_it = [cells.get((name, column), []) for column in columns]
        shown = [cell(found, best.get(column, 0.0), diverging) for found, column in zip(of_it, columns, strict=True)]
        alike = [row for found in of_it for row in found if row["machine"] == usual]
        seconds = [float(row["seconds"]) for row in alike if row["images_from_store"] == "True"]
        spent = f"{statistics.median(seconds):.0f}" if seconds else ""
        lines.append(f"| {name} | {' | '.join(shown)} | {spent} |")
    return lines


def cell(rows: list[dict[str, str]], best: float, diverging: bool) -> str:
    """Mean top-1 and sample deviation, bold where it is the best; then the mean divergence from the float network."""
    if not rows:
        return ""
    text = spread([float(row["top1"]) for row in rows])
    told = f", KL {mean_of(rows, 'kl'):.3f}" if diverging else ""
    return (f"**{text}**" if mean_of(rows, "top1") >= best - 0.005 else text) + told


def mean_of(rows: list[dict[str, str]], key: str) -> float:
    """Mean of a column."""
    return statistics.mean(float(row[key]) for row in rows)


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    tables = {
        document: [line for name, title in titles.items() if rows_of(name) for line in table(name, title)]
        + [line for name, title in PIVOTS.get(document, {}).items() if rows_of(name) for line in pivoted(name, title)]
        for document, titles in TABLES.items()
    }
    tables |= {f"docs/methods/{name}.md": card(images) for name, images in CARDS.items()}
    every = pivot(rows_of("calibration_cifar10"))
    tables |= {document: pivot_card(every, methods) for document, methods in PIVOT_CARDS.items()}
    for document, lines in tables.items():
        path = ROOT / document
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
