"""Reading the file of an offline W&B run, for which wandb has no Python reader."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

HEADER = 7  # of the file, and of each chunk
BLOCK = 32768
FULL, FIRST, LAST = 1, 2, 4


@dataclass
class OfflineRun:
    """What an offline run holds; `axes` maps patterns of metrics to their step metric, `artifacts` names to files."""

    folder: Path
    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def series(self, key: str) -> list[tuple[Any, Any]]:
        """(step of its own stage, value) of a metric."""
        stage = key.split("/")[0]
        return [(row.get(f"{stage}/step"), row[key]) for row in self.history if key in row]

    def file(self, value: dict[str, Any]) -> Path:
        """The file of a picture or table in the history."""
        return self.folder / "files" / value["path"]

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of the last table of that key."""
        (*_, (_, value)) = self.series(key)
        content = json.loads(self.file(value).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def read_runs(folder: Path, patience: float = 10.0) -> list[OfflineRun]:
    """All runs below the folder, in the order of their start; those just finished take a moment to reach the disk."""
    paths = sorted(folder.rglob("run-*.wandb"), key=lambda path: path.parent.stat().st_ctime_ns)
    end = time.monotonic() + patience
    while any(read_run(path).exit_code is None for path in paths) and time.monotonic() < end:
        time.sleep(0.02)
    return [read_run(path) for path in paths]


def read_run(path: Path) -> OfflineRun:
    """One `.wandb` file; `exit_code` is None where it is not finished."""
    run = OfflineRun(path.parent)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        own = getattr(record, kind)
        if kind == "run":
            run.id, run.name, run.project = own.run_id, own.display_name, own.project
            run.group, run.job_type, run.tags = own.run_group, own.job_type, list(own.tags)
            put(run.config, own.config.update)
        elif kind == "config":
            put(run.config, own.update)
        elif kind == "summary":
            put(run.summary, own.update)
        elif kind == "history":
            run.history.append({})
            put(run.history[-1], own.item)
        elif kind == "metric":
            run.axes[own.name or own.glob_name] = own.step_metric
        elif kind == "artifact":
            run.artifacts[own.name] = own
        elif kind == "exit":
            run.exit_code = own.exit_code
    return run


def put(target: dict[str, Any], items: Any) -> None:
    """Set values by their nested key."""
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = target
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)


def records(path: Path) -> Iterator[Any]:
    """LevelDB's log: blocks of 32 KiB, chunks with checksum, length and kind."""
    data = path.read_bytes()
    if not data:
        return  # just made
    assert data[:4] == b":W&B"
    position, whole = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # the rest of a block is padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + HEADER : position + HEADER + length]
        if (kind == 0 and length == 0) or len(chunk) < length:  # the writer was killed
            return
        position += HEADER + length
        whole = chunk if kind in (FULL, FIRST) else whole + chunk
        if kind in (FULL, LAST):
            record = pb.Record()
            record.ParseFromString(whole)
            yield record
