"""How two runs, or two sweeps, differ: in configuration, in versions and machine, in what was measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from callbacks.report import flat
from callbacks.run_record import UNHASHED
from callbacks.sweep_results import group, read_sweep, settings_that_differ, spread
from callbacks.sweep_runs import Run

ABSENT = "(absent)"
ORIGINS = ("commit", "machine")


def read_record(path: Path) -> dict[str, Any]:
    """A run's record, from its file or its folder.

    Raises:
        ValueError: if there is none, or it is no record.
    """
    file = path / "record.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"record: expected a record.json or the folder of a run, got {path}, which has none")
    try:
        record = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"record: expected a run's record.json, got {file}, which is corrupt ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"record: expected a run's record.json, got {file}, which has no configuration")
    return record


def compare(a: Path, b: Path) -> list[dict[str, Any]]:
    """Rows of what differs between two runs or two sweeps, with `what`, `a`, `b` and `b - a`; metrics also if equal.

    Raises:
        ValueError: if one is no run or sweep, or one is a run and the other a sweep.
    """
    alone = [path.is_file() or (path / "record.json").exists() for path in (a, b)]
    if alone[0] != alone[1]:
        raise ValueError(f"compare: expected two runs or two sweeps, got one of each: {a} and {b}")
    if alone[0]:
        first, second = read_record(a), read_record(b)
        return [*settings_between(first, second), *origins_between(first, second), *metrics_between(first, second)]
    return _sweeps_between(a, b)


def settings_between(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of options and values of the configuration that differ; those of a group only where both chose the same."""
    rows = []
    chosen = [_settings(record.get("choices", {})) for record in (a, b)]
    other = {key for key in chosen[0] | chosen[1] if chosen[0].get(key, ABSENT) != chosen[1].get(key, ABSENT)}
    for key in sorted(other):
        rows.append(_row(f"config {key}", chosen[0].get(key, ABSENT), chosen[1].get(key, ABSENT)))
    leaves = [flat(_settings(record["config"])) for record in (a, b)]
    for key in sorted(leaves[0].keys() | leaves[1].keys()):
        pair = [part.get(key, ABSENT) for part in leaves]
        if pair[0] != pair[1] and key.split(".")[0] not in other:
            rows.append(_row(f"config {key}", *pair))
    return rows


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says where and how a run is watched."""
    return {key: value for key, value in config.items() if key.split("/")[0] not in (*UNHASHED, "hydra")}


def origins_between(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of versions, commit, machine, weights and images that differ: why equal settings may give other numbers."""
    parts = []
    for record in (a, b):
        found = {f"version {name}": version for name, version in record.get("versions", {}).items()}
        found |= {key: record.get(key, ABSENT) for key in ORIGINS}
        found["teacher's weights"] = record.get("teacher", {}).get("weights_hash", ABSENT)
        found["images"] = record.get("images", {}).get("digest", ABSENT)
        data = [entry for entry in record.get("real_data", []) if entry["stage"] == "evaluation"]
        found["evaluation data"] = data[0]["digest"] if data else ABSENT
        parts.append(found)
    keys = dict.fromkeys([*parts[0], *parts[1]])
    pairs = [(key, parts[0].get(key, ABSENT), parts[1].get(key, ABSENT)) for key in keys]
    return [_row(*pair) for pair in pairs if pair[1] != pair[2]]


def metrics_between(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of all metrics."""
    first, second = a.get("metrics", {}), b.get("metrics", {})
    return [_row(key, first.get(key, ABSENT), second.get(key, ABSENT)) for key in dict.fromkeys([*first, *second])]


def _row(what: str, a: Any, b: Any) -> dict[str, Any]:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return {"what": what, "a": a, "b": b, "b - a": b - a if numbers else ""}


def _sweeps_between(a: Path, b: Path) -> list[dict[str, Any]]:
    """What the runs of each share and those of the other do not, then top-1 of every setting, matched by its label."""
    runs = [[run for run in read_sweep(path).runs if run.status == "finished"] for path in (a, b)]
    for path, found in zip((a, b), runs, strict=True):
        if not found:
            raise ValueError(f"compare: expected sweeps with finished runs, {path} has none")
    rows = [row for row in settings_between(*_shared(runs)) if ABSENT not in (row["a"], row["b"])]
    rows += origins_between(runs[0][0].record, runs[1][0].record)
    keys = list(dict.fromkeys(key for found in runs for key in settings_that_differ(found)))
    groups = [{setting.label: setting for setting in group(found, keys)} for found in runs]
    for label in dict.fromkeys([*groups[0], *groups[1]]):
        pair = [part.get(label) for part in groups]
        tops = [statistics.mean(setting.metrics("quantized")) for setting in pair if setting is not None]
        texts = [ABSENT if setting is None else spread(setting.metrics("quantized")) for setting in pair]
        difference = round(tops[1] - tops[0], 4) if len(tops) == 2 else ""
        rows.append({"what": f"top-1 {label}", "a": texts[0], "b": texts[1], "b - a": difference})
    return rows


def _shared(sweeps: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """Choices and configuration that are the same in all runs of a sweep, in the form of a record."""
    found = []
    for runs in sweeps:
        choices = dict(runs[0].record.get("choices", {}))
        leaves = dict(runs[0].leaves)
        for run in runs[1:]:
            own = run.record.get("choices", {})
            choices = {key: value for key, value in choices.items() if own.get(key) == value}
            leaves = {key: value for key, value in leaves.items() if run.leaves.get(key) == value}
        config = {key: value for key, value in leaves.items() if key.split(".")[0] not in UNHASHED}
        found.append({"choices": choices, "config": config})
    return found
