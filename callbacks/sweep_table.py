"""The table at the end of a sweep: one line a setting, mean and deviation over seeds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table


class SweepTable(Callback):
    """Hydra callback: read every `record.json` below the sweep's folder and print them as one table."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """After a failed job of a sweep, print what there is: Hydra 1.3 does not call `on_multirun_end` then."""
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            Console().print(sweep_table(Path(config.hydra.sweep.dir)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the table; called by Hydra on the launching machine."""
        Console().print(sweep_table(Path(config.hydra.sweep.dir)))


def sweep_table(folder: Path) -> Table:
    """Group the runs below `folder` by their overrides without `seed`; failed runs are listed with their error."""
    groups: dict[str, list[dict[str, Any]]] = {}
    failed: list[tuple[str, str]] = []
    for path in sorted(folder.glob("**/record.json")):
        record = json.loads(path.read_text())
        if record["status"] != "finished":
            failed.append((path.parent.name, str(record.get("error", record["status"]))))
            continue
        setting = " ".join(o for o in record.get("overrides", []) if not o.startswith("seed="))
        groups.setdefault(setting or record["config"].get("name", "default"), []).append(record)
    table = Table(title=f"sweep {folder}", caption="top-1 in per cent, mean ± sample deviation over seeds")
    for column in ("setting", "runs", "float", "nearest", "quantized", "drop"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for setting, records in groups.items():
        top1 = [[r["metrics"][f"test/{name}/top1"] for r in records] for name in ("float", "nearest", "quantized")]
        drops = [f - q for f, q in zip(top1[0], top1[2], strict=True)]
        table.add_row(setting, str(len(records)), *(spread(values) for values in [*top1, drops]))
    for name, error in failed:
        table.add_row(name, "failed", error.splitlines()[0][:80] if error else "", "", "", "", style="red")
    return table


def spread(values: list[float]) -> str:
    """`mean ± deviation`, or the value alone where there is one."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
