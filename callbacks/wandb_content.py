"""What a W&B run shows of a job's folder: pictures, tables, sizes and seconds, and artifacts with their lineage."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import wandb

from callbacks.report import named
from callbacks.wandb_access import short
from deployment.exports import FILE, PARITY

log = logging.getLogger(__name__)

# Key in W&B by file in the run's folder.
PICTURES = {
    "images.png": "images/samples",
    "targets.png": "synthesis/targets",
    "allocation.png": "allocation/plot",
}
TABLES = {
    "quantizers.csv": "convert/quantizers",
    "units.csv": "reconstruction/units",
    "sensitivities.csv": "allocation/sensitivities",
    **{name: f"export/{Path(name).stem}" for name in PARITY.values()},
}
BARS = {"units.csv": ("reconstruction/errors", "unit", "error_hard")}  # drawn by W&B itself: key, labels, values
STUDENT = ("student.safetensors", "record.json", "allocation.yaml", ".hydra/config.yaml")  # what loads it again
METHODS = ("pipeline", "distillation", "reconstruction", "weight")  # the first that is chosen names the job's type
MADE_BY = ("generator", "weight", "activation", "reconstruction", "distillation", "allocation", "experiment")
USUAL = {"allocation": "uniform"}  # not worth a tag
LONGEST = 64  # characters of a tag in W&B
MOST_MIB = 512  # of images that are uploaded; of larger sets only the picture


def labels(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Name, job type and tags of a run from the facts of its record."""
    config, choices = facts["config"], facts.get("choices", {})
    chosen = {group: named(choices.get(group)) for group in (*METHODS, *MADE_BY, "calibration")}
    source = str(config["calibration"].get("_target_", ""))
    if not source.endswith("SyntheticImages"):
        chosen["generator"] = chosen["calibration"]
    bits = config["bits"]
    tags = [config["model"]["name"], config["protocol"]["name"], f"W{bits['weight']}A{bits['activation']}"]
    tags += [chosen[group] for group in ("pipeline", *MADE_BY) if chosen[group] not in ("none", USUAL.get(group))]
    tags += list(config.get("corrections") or {})
    overrides = [text for text in facts.get("overrides", []) if not text.startswith(("logger", "paths.", "callbacks"))]
    return {
        "name": " ".join([config["name"], *overrides])[:128],
        "job_type": next((chosen[group] for group in METHODS if chosen[group] != "none"), "job"),
        "tags": list(dict.fromkeys(str(tag)[:LONGEST] for tag in tags)),
    }


class Content:
    """Remembers what was shown, so that a stage shows only what is new.

    Args:
        artifacts: whether any are logged.
    """

    def __init__(self, artifacts: bool) -> None:
        self.artifacts = artifacts
        self._seen: dict[str, int] = {}

    def show(self, run: Any, folder: Path, facts: Mapping[str, Any]) -> None:
        """Log the pictures and tables that were written since the last call."""
        row: dict[str, Any] = {}
        for name, key in PICTURES.items():
            if self._is_new(folder / name):
                caption = self._caption(name, facts)
                row[key] = readable(folder / name, lambda path, text=caption: wandb.Image(str(path), caption=text))
        for name, key in TABLES.items():
            if self._is_new(folder / name) and (table := readable(folder / name, read_table)) is not None:
                row[key] = table
                if name in BARS and set(BARS[name][1:]) <= set(table.columns):
                    bar, *columns = BARS[name]
                    row[bar] = wandb.plot.bar(table, *columns, title=f"{columns[1]} of every {columns[0]}")
        row = {key: value for key, value in row.items() if value is not None}
        if row:
            run.log(row)

    def conclude(self, run: Any, folder: Path, facts: Mapping[str, Any]) -> None:
        """Fill the summary and log the artifacts."""
        run.summary.update(summary(facts))
        if not self.artifacts or facts.get("status") != "finished":
            return
        uses = []
        for artifact, made_here in (images(folder, facts), allocation(run.id, folder, facts)):
            if artifact is None:
                continue
            uses.append(artifact.name)
            if made_here:
                run.log_artifact(artifact)
            elif not run.settings.mode.startswith("offline"):  # offline, wandb takes outputs only
                run.use_artifact(artifact)
        for artifact in students(run.id, folder, facts):
            artifact.metadata["uses"] = list(uses)  # lineage that offline runs keep too
            run.log_artifact(artifact)
            uses.append(artifact.name)

    def _is_new(self, path: Path) -> bool:
        if not path.exists():
            return False
        written = path.stat().st_mtime_ns
        known, self._seen[path.name] = self._seen.get(path.name), written
        return known != written

    @staticmethod
    def _caption(name: str, facts: Mapping[str, Any]) -> str | None:
        found = facts.get("images", {})
        return f"{found.get('count')} {found.get('origin')}, {found.get('digest')}" if name == "images.png" else None


def readable(path: Path, read: Callable[[Path], Any]) -> Any:
    """What can be read of a file; None, and a warning, where it is missing, half written or of another kind."""
    try:
        return read(path)
    except Exception as error:  # of wandb's, pillow's and others' libraries
        log.warning("W&B is not shown %s (%s)", path, short(error))
        return None


def read_table(path: Path) -> wandb.Table:
    """A csv as a W&B table, numbers as numbers."""
    with path.open(newline="") as file:
        header: list[Any]
        header, *rows = csv.reader(file)
    return wandb.Table(columns=header, data=[[number(cell) for cell in row] for row in rows], allow_mixed_types=True)


def number(cell: str) -> float | str | None:
    """The cell as a number where it is one; None where it is empty."""
    try:
        return float(cell)
    except ValueError:
        return cell or None


def summary(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds and peak memory of the stages, how it ended, and whether it was free of data."""
    stages: Mapping[str, Mapping[str, float]] = facts.get("stages", {})
    found: dict[str, Any] = {f"{key}/{stage}": value for stage, own in stages.items() for key, value in own.items()}
    found["seconds/total"] = sum(own["seconds"] for own in stages.values())
    return found | {
        key: facts[key] for key in ("status", "error", "data_free", "warning") if facts.get(key) is not None
    }


def images(folder: Path, facts: Mapping[str, Any]) -> tuple[wandb.Artifact | None, bool]:
    """The calibration images, named by their digest, and whether this run made them."""
    found = facts.get("images", {})
    if not found.get("count") or not found.get("digest"):
        return None, False
    metadata = {key: found[key] for key in ("origin", "count", "digest")} | {"teacher": facts.get("teacher")}
    artifact = wandb.Artifact(f"images-{found['digest']}", type="calibration-images", metadata=metadata)
    _add(artifact, folder, ["images.png"])
    stored = Path(facts["config"]["paths"]["store"]) / str(facts.get("stored_images"))
    if stored.is_file() and stored.stat().st_size <= MOST_MIB * 2**20:
        artifact.add_file(str(stored), name=stored.name, policy="immutable", skip_cache=True)
    return artifact, not found.get("from_store", False)


def allocation(run_id: str, folder: Path, facts: Mapping[str, Any]) -> tuple[wandb.Artifact | None, bool]:
    """The widths that a search found."""
    if not (folder / "allocation.yaml").exists():
        return None, False
    artifact = wandb.Artifact(f"allocation-{run_id}", type="allocation", metadata=dict(facts.get("allocation", {})))
    _add(artifact, folder, ["allocation.yaml", "sensitivities.csv", "allocation.png"])
    return artifact, True


def students(run_id: str, folder: Path, facts: Mapping[str, Any]) -> list[wandb.Artifact]:
    """The student with all that loads it again, and its export."""
    metadata = {
        "teacher": facts.get("teacher"),
        "config_hash": facts.get("config_hash"),
        "metrics": facts.get("metrics"),
        "bytes": facts.get("bytes"),
        "data_free": facts.get("data_free"),
    }
    found = []
    for kind, files in (("student", STUDENT), ("onnx", (FILE, *PARITY.values()))):
        if (folder / files[0]).exists():
            artifact = wandb.Artifact(f"{kind}-{run_id}", type="model", metadata=dict(metadata))
            _add(artifact, folder, files)
            found.append(artifact)
    return found


def _add(artifact: wandb.Artifact, folder: Path, names: Any) -> None:
    """Add the files there are, without a copy of wandb's own: the run's folder keeps them."""
    for name in names:
        if (folder / name).exists():
            artifact.add_file(str(folder / name), name=name, policy="immutable", skip_cache=True)
