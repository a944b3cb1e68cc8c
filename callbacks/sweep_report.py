"""What a sweep ends in, and what it has at any time: a table, `sweep.csv`, `sweep.md`, plots, `report.html`."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.table import Table

from callbacks import report
from callbacks.sweep_page import columns, page
from callbacks.sweep_plan import FAILURE
from callbacks.sweep_plots import heat_map, pareto, save_png
from callbacks.sweep_results import Sweep, read_sweep, spread
from callbacks.sweep_runs import Run
from deployment.whole_file import remove_unfinished, whole_file
from synthesis.leases import Lease

MEANING = "top-1 in per cent, mean ± sample deviation over seeds; drop in points below the float network"
FILES = ("sweep.csv", "sweep.md", "pareto.png", "heat_map.png", "report.html")
SILENCE = 60.0  # seconds after which a process on another host that makes the report is taken for dead
PATIENCE_S = 300.0
IDENTITY = ("network", "protocol", "w_bits", "a_bits", "seed", "config_hash")  # of a row without a result


class SweepReport(Callback):
    """Hydra callback: make the report of a multirun when it ends, on the launching machine."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Keep the error of a failed job, whose record may not exist yet or not know of it.

        Where another sweeper than ours raises it, Hydra 1.3 calls no `on_multirun_end`: the table comes now.
        """
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        keep_failure(Path(config.hydra.runtime.output_dir), job_return._return_value)
        if config.hydra.runtime.choices.get("hydra/sweeper") != "keep_going":
            report.console.print(sweep_table(read_sweep(Path(config.hydra.sweep.dir))))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write all files and print the table; nothing where no job was begun."""
        folder = Path(config.hydra.sweep.dir)
        if folder.exists():
            make_report(folder)


def keep_failure(folder: Path, error: BaseException) -> Path:
    """Write `failed.json`, by a temporary name and a rename; returns its path."""
    lines = traceback.format_exception(error)
    facts = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(lines)}
    with whole_file(folder / FAILURE) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
    return folder / FAILURE


def make_report(folder: Path) -> Sweep:
    """Write `sweep.csv`, `sweep.md`, `pareto.png`, `heat_map.png` and `report.html`, and print the table.

    One process at a time reads and writes, lest the files of the one that read first stand at the end.

    Raises:
        ValueError: if the folder holds no sweep.
    """
    if not folder.is_dir():
        raise ValueError(f"folder: expected that of a sweep, got {folder}, which is none")
    with Lease(folder / ".report.lock", SILENCE).held(PATIENCE_S):
        sweep = read_sweep(folder)
        for name in FILES:
            remove_unfinished(folder / name)
        if sweep.runs:
            _write(folder / "sweep.csv", report.as_csv(rows(sweep.runs)))
        for name, draw in (("pareto", pareto), ("heat_map", heat_map)):
            if (figure := draw(sweep.settings)) is not None:
                save_png(figure, folder / f"{name}.png")
        _write(folder / "sweep.md", markdown(sweep))
        _write(folder / "report.html", page(sweep, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")))
    report.console.print(sweep_table(sweep))
    report.console.print(f"report.html, sweep.csv, sweep.md in {folder}", highlight=False)
    return sweep


def _write(path: Path, text: str) -> None:
    with whole_file(path, several=True) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a run, finished or not: the columns of every results file, then bytes, status, error, overrides, folder."""
    keys = list(dict.fromkeys(key for run in runs for key in run.record.get("row", {}))) or list(IDENTITY)
    return [
        {key: _cell(run, key) for key in keys}
        | {
            "bytes": run.record.get("bytes", {}).get("quantized"),
            "status": run.status,
            "error": (run.error or "").partition("\n")[0] or None,
            "overrides": " ".join(sorted(run.overrides)),
            "folder": run.name,
        }
        for run in runs
    ]


def _cell(run: Run, key: str) -> Any:
    """A column of a run's row, or, where it has none, what its configuration says."""
    if key in run.record.get("row", {}):
        return run.record["row"][key]
    config = run.config
    known = {
        "network": config.get("model", {}).get("name"),
        "protocol": config.get("protocol", {}).get("name"),
        "w_bits": config.get("bits", {}).get("weight"),
        "a_bits": config.get("bits", {}).get("activation"),
        "seed": run.seed or None,
        "config_hash": run.record.get("config_hash"),
    }
    return known.get(key)


def sweep_table(sweep: Sweep) -> Table:
    """The settings for a terminal; failed runs with their error."""
    table = Table(
        title=f"sweep {sweep.folder}: {sweep.progress}",
        caption=MEANING,
    )
    shown = ("setting", "runs", "float", "nearest", "top-1", "drop", "KiB", "s")
    for column in shown:
        table.add_column(column, justify="left" if column == "setting" else "right", overflow="fold")
    for setting in sweep.settings:
        kib = "" if setting.kib is None else f"{setting.kib:.0f}"
        tops = [spread(setting.metrics(name)) for name in ("float", "nearest", "quantized")]
        seconds = f"{sum(run.seconds or 0.0 for run in setting.runs):.0f}"
        table.add_row(setting.label, str(len(setting.runs)), *tops, spread(setting.drops()), kib, seconds)
    for run in sweep.failed:
        error = (run.error or "").partition("\n")[0][:120]
        table.add_row(f"{run.name} {error}", run.status, *[""] * (len(shown) - 2), style="red")
    return table


def markdown(sweep: Sweep) -> str:
    """The same as text to paste, with every column of the page."""
    lines = [f"# Sweep {sweep.folder.resolve().name}", "", sweep.progress, ""]
    if sweep.plan is not None:
        lines += ["```bash", sweep.plan.command, "```", ""]
    if sweep.settings:
        shown = columns(sweep.settings)
        lines += ["| " + " | ".join(name for name, _, _ in shown) + " |", "|" + "---|" * len(shown)]
        lines += ["| " + " | ".join(_plain(text(s)) for _, text, _ in shown) + " |" for s in sweep.settings]
        lines += [
            "",
            f"{MEANING[0].upper()}{MEANING[1:]}.",
            "",
        ]
    if sweep.failed:
        lines += ["## Without a result", ""]
        lines += [f"- `{run.name}` {run.status}: {_plain(run.error or 'no error was left')}" for run in sweep.failed]
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    return text.partition("\n")[0].replace("|", "\\|")
