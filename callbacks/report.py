"""What a run prints and keeps for people: differences from the defaults, quantizers, units, and the result table."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from deployment.whole_file import whole_file

console = Console()


def show_configuration(cfg: DictConfig, show_tree: bool) -> None:
    """Print every value that differs from the defaults, and the whole configuration as a tree if asked."""
    console.rule("[bold]calibrant")
    rows = [{"setting": key, "default": old, "this run": new} for key, old, new in differences(cfg)]
    if rows:
        show_rows("differences from the defaults", rows, show=True)
    else:
        console.print("all settings are the defaults")
    if show_tree:
        tree = Tree("configuration")
        for key, value in cfg.items():
            text = OmegaConf.to_yaml(value).rstrip() if OmegaConf.is_config(value) else str(value)
            tree.add(f"[bold]{key}[/]").add(escape(text))
        console.print(tree)


def differences(cfg: DictConfig) -> list[tuple[str, str, str]]:
    """(dotted key, default, value) of all settings that differ from `conf/config.yaml`; empty outside Hydra."""
    if not GlobalHydra.instance().is_initialized():
        return []
    defaults, chosen = flat(compose("config")), flat(cfg)
    keys = [key for key in {**defaults, **chosen} if not key.startswith("paths.")]
    absent = "(absent)"
    pairs = [(key, defaults.get(key, absent), chosen.get(key, absent)) for key in keys]
    return [(key, old, new) for key, old, new in pairs if old != new]


def flat(config: DictConfig | Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Leaves of a configuration by dotted key, as text, interpolations as they are written."""
    plain: Any = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    leaves: dict[str, str] = {}
    for key, value in (plain or {}).items():
        if isinstance(value, Mapping) and value:
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = str(value)
    return leaves


def show_rows(title: str, rows: Iterable[Mapping[str, Any]], *, show: bool, path: Path | None = None) -> None:
    """Print rows of equal keys as a table if `show`, and write them to the csv at `path` if one is given."""
    rows = list(rows)
    if not rows:
        return
    if path is not None:
        write_csv(path, rows)
    if not show:
        return
    table = Table(title=title)
    for key, value in rows[0].items():
        table.add_column(key, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(pretty(value) for value in row.values()))
    console.print(table)


def show_results(
    metrics: Mapping[str, float],
    stages: Mapping[str, Mapping[str, float]],
    sizes: Mapping[str, float],
    caption: str,
) -> None:
    """The last table: a row a network, and the seconds of each stage.

    Args:
        metrics: `test/<network>/<metric>`, in per cent.
        stages: seconds and peak memory by stage.
        sizes: bytes by network, where known.
        caption: protocol, bits and images, without which the numbers mean little.
    """
    names = list(dict.fromkeys(key.split("/")[1] for key in metrics if key.startswith("test/")))
    base = metrics["test/float/top1"]
    table = Table(title="top-1 in per cent", caption=caption)
    for column in ("network", "top-1", "drop", "agreement", "size"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in names:
        top1 = metrics[f"test/{name}/top1"]
        agreement = metrics.get(f"test/{name}/agreement")
        size = sizes.get(name)
        table.add_row(
            name,
            f"{top1:.2f}",
            "" if name == "float" else f"{base - top1:.2f}",
            "" if agreement is None or name == "float" else f"{agreement:.2f}",
            "" if size is None else f"{size / 1024:.0f} KiB",
        )
    console.print(table)
    times = Table(title="seconds a stage")
    for stage in stages:
        times.add_column(stage, justify="right")
    times.add_row(*(f"{facts['seconds']:.1f}" for facts in stages.values()))
    console.print(times)


def flag_float_accuracy(measured: float, stated: float | None, tolerance: float) -> str | None:
    """A warning where the float accuracy measured here differs from the stated one by more than `tolerance` points."""
    if stated is None or abs(measured - stated) <= tolerance:
        return None
    message = (
        f"float top-1 is {measured:.2f} here, but the model configuration states {stated:.2f}: check weights, "
        "normalisation and resizing before trusting the numbers below it"
    )
    console.print(f"[bold yellow]warning:[/] {message}", highlight=False)
    return message


def all_stages(facts: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """What every stage took, those before a kill included."""
    return [stage for part in (*facts.get("earlier_stages", []), facts.get("stages", {})) for stage in part.values()]


def result_row(facts: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a results csv from a run's facts: the columns every results file has, then what helps to repeat it."""
    metrics, config, choices = facts["metrics"], facts["config"], facts["choices"]
    allocation = facts.get("allocation", {})
    origin = facts["images"]["origin"] + ("+generated" if facts["images"].get("added") else "")
    synthetic = origin == "synthetic"
    stages = all_stages(facts)
    return {
        "network": facts["teacher"]["name"],
        "float_top1": round(metrics["test/float/top1"], 2),
        "protocol": config["protocol"]["name"],
        "w_bits": config["bits"]["weight"],
        "a_bits": config["bits"]["activation"],
        "images": choices.get("generator") if synthetic else origin,
        "image_count": facts["images"]["count"],
        "pipeline": choices.get("reconstruction"),
        "allocation": allocation.get("name", "uniform"),
        "seed": config["seed"],
        "top1": round(metrics["test/quantized/top1"], 2),
        "agreement": round(metrics["test/quantized/agreement"], 2),
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "peak_mib": max(stage["peak_mib"] for stage in stages),
        "machine": facts["machine"],
        "commit": facts["commit"],
        "date": facts["started"][:10],
        "nearest_top1": round(nearest, 2) if (nearest := metrics.get("test/nearest/top1")) is not None else None,
        "weight": choices.get("weight"),
        "activation": choices.get("activation"),
        "iterations": config["reconstruction"].get("iterations"),
        "test_images": facts["test_images"],
        "config_hash": facts["config_hash"],
        "corrections": "+".join(config.get("corrections", {})) or "none",
        "experiment": named(choices.get("experiment")),
        "generator_steps": generator_steps(config["generator"]) if synthetic else None,
        "images_from_store": facts["images"]["from_store"],
        "recipe": named(choices.get("pipeline")),
        "hardware": allocation.get("hardware", "none"),
        "average_w_bits": rounded(allocation.get("average_weight_bits")),
        "average_a_bits": rounded(allocation.get("average_activation_bits")),
        "size_fraction": rounded(allocation.get("size_fraction")),
        "distillation": named(choices.get("distillation")),
        "kl": float(pretty(metrics["test/quantized/kl"])),
    }


def rounded(value: float | None) -> float | None:
    """Four decimals, where there is a number."""
    return None if value is None else round(value, 4)


def generator_steps(generator: Mapping[str, Any]) -> int:
    """Optimizer steps for each batch of images; none for noise, whatever `steps` a sweep over generators sets."""
    return 0 if str(generator["_target_"]).endswith(".build_noise") else int(generator["steps"])


def named(choice: str | None) -> str:
    """The chosen option of a group that may be left out, or `none`."""
    return "none" if choice in (None, "None", "null") else str(choice)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys, by a temporary name and a rename."""
    with whole_file(path) as temporary:
        temporary.write_text(as_csv(rows), newline="")


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as text."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def pretty(value: Any) -> str:
    """Short text for a table cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_rows(items: Iterable[Any]) -> list[dict[str, Any]]:
    """Dataclass instances as dictionaries."""
    return [asdict(item) for item in items]
