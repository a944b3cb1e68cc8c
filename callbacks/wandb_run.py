"""A run in Weights & Biases, offline or online: a logger that never costs a job its result.

wandb's Python library, docs.wandb.ai/ref/python.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers.logger import DummyLogger, Logger
from pytorch_lightning.utilities import rank_zero_only

from callbacks import wandb_access
from callbacks.wandb_access import short
from callbacks.wandb_content import Content, labels, readable
from deployment.whole_file import whole_file

log = logging.getLogger(__name__)

DEPTH = 3  # of a job's folder below that of its sweep
IDENTITY = "wandb_run.json"  # in the run's folder: what a requeued or resumed job continues


class WandbRun(Logger):
    """One W&B run for one job: configuration, metrics with an axis a stage, pictures, tables, artifacts.

    Whatever fails in W&B is said once, in a warning, and the job goes on: a run that cannot be opened online is kept
    offline, one that cannot be kept is left out, and so is a picture or table that cannot be read. Nobody is asked for
    a login. Only the first of several processes logs.

    Args:
        project: in W&B.
        save_dir: the run's folder, where `wandb_run.json` says which run it is. `wandb/` is made there too, or in the
            sweep's folder, so that one call shows or uploads all runs of a sweep.
        name: of the run; None: the job's name and what it overrides.
        group: None: the name of the sweep's folder, where there is a sweep.
        job_type: None: the pipeline, or else the fine-tuning, reconstruction or rounding.
        tags: beside those that name network, protocol, widths, images and method.
        offline: write files for `wandb sync`; neither login nor network is needed.
        artifacts: whether images, allocation, student and export become artifacts.
    """

    def __init__(
        self,
        project: str,
        save_dir: str,
        *,
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        offline: bool = False,
        artifacts: bool = True,
    ) -> None:
        super().__init__()
        self.project = project
        self.folder = Path(save_dir)
        self.offline = offline
        self._labels: dict[str, Any] = {"name": name, "group": group, "job_type": job_type, "tags": list(tags)}
        self._config: dict[str, Any] = {}
        self._content = Content(artifacts)
        self._stages: set[str] = set()
        self._run: Any = None
        self._given_up = rank_zero_only.rank != 0

    @property
    def name(self) -> str:
        """The project."""
        return self.project

    @property
    def version(self) -> str | None:
        """The run's id; None before it has started."""
        return None if self._run is None else self._run.id

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`, started when it is first asked for; a dummy that takes everything where there is none."""
        if self._run is None and not self._given_up:
            with self._tolerated("start"):
                self._run = self._start()
        return DummyLogger().experiment if self._run is None or self._given_up else self._run

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Take names, tags and origin from the record of the job; before anything is logged."""
        found = labels(facts)
        given = self._labels
        self._labels = {key: given[key] or found.get(key) for key in given}
        sweep = sweep_folder(self.folder)
        self._labels["group"] = self._labels["group"] or (sweep.name if sweep else None)
        self._labels["tags"] = list(dict.fromkeys([*given["tags"], *found["tags"]]))
        origin = ("commit", "config_hash", "machine", "versions", "overrides", "choices")
        self._config |= {key: facts[key] for key in origin if key in facts}

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Keep the resolved configuration, at the top level of the run's config."""
        self._config = {**params, **self._config}
        run = self.experiment
        with self._tolerated("keep the configuration"):
            run.config.update(self._config, allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log `<stage>/<metric>` against `<stage>/step`: every stage counts its own steps."""
        run = self.experiment
        row: dict[str, Any] = {key: value for key, value in metrics.items() if key != "epoch"}
        with self._tolerated("log metrics"):
            for stage in {key.split("/")[0] for key in row if "/" in key}:
                if stage not in self._stages:
                    run.define_metric(f"{stage}/step", hidden=True)
                    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                    self._stages.add(stage)
                beside = {"step": step, "epoch": metrics.get("epoch")}
                row |= {f"{stage}/{key}": value for key, value in beside.items() if value is not None}
            run.log(row)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[str], step: int | None = None) -> None:
        """Show picture files under one key."""
        found = [readable(Path(path), lambda path: wandb.Image(str(path))) for path in images]
        pictures: Any = [picture for picture in found if picture is not None]
        if pictures:
            self.log_metrics({key: pictures}, step)

    @rank_zero_only
    def show(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Show the pictures and tables in the run's folder that are new since the last call."""
        run = self.experiment
        with self._tolerated("show pictures and tables"):
            if not self._given_up:
                self._content.show(run, folder, facts)

    @rank_zero_only
    def conclude(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Show what is left, put sizes and seconds into the summary, log the artifacts, and end the run.

        A job that was interrupted may have to be requeued before it is killed, so that it waits for a short time only.
        """
        if facts.get("status") != "interrupted":
            self._conclude(folder, facts)
        elif not wandb_access.within(wandb_access.HAND_OVER_S, lambda: self._conclude(folder, facts)):
            log.warning("W&B was too slow for a job that is stopped; what is missing there is kept for `wandb sync`")

    def _conclude(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.show(folder, facts)
        if self._run is not None and not self._given_up:
            with self._tolerated("log the summary and artifacts"):
                self._content.conclude(self._run, folder, facts)
        if self._run is not None:
            with self._tolerated("finish the run"):
                self._run.finish(exit_code=0 if facts.get("status") == "finished" else 1)
        if self._given_up:  # and it must not meet a broken service
            with self._tolerated("end its service"):
                wandb.teardown()
        self._run, self._given_up = None, True

    def _start(self) -> Any:
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / IDENTITY
        known = json.loads(kept.read_text()) if kept.exists() else {}
        identity = {
            "id": known.get("id") or given_id(self.folder),
            "group": known.get("group") or self._labels["group"],
        }
        place = known.get("files") or os.path.relpath(sweep_folder(self.folder) or self.folder, self.folder)
        with whole_file(kept) as temporary:
            temporary.write_text(json.dumps(identity | {"files": place}) + "\n")
        arguments: dict[str, Any] = self._labels | identity
        arguments |= {"project": self.project, "dir": str((self.folder / place).resolve())}
        arguments |= {"reinit": "create_new", "resume": "allow" if known else None}
        arguments["settings"] = wandb_access.settings()
        mode = wandb_access.mode(self.offline)
        if mode == "online" and not wandb_access.has_login():
            log.warning("W&B has no login here (`wandb login`); the run is kept offline, for `wandb sync`")
            mode = "offline"
        if mode not in ("offline", "dryrun"):
            try:
                return wandb.init(**arguments)
            except Exception as error:
                log.warning("W&B cannot be reached (%s); the run is kept offline, for `wandb sync`", short(error))
                wandb.teardown()  # else the id is still in use
        return wandb.init(**arguments | {"mode": "offline", "resume": None})

    @contextmanager
    def _tolerated(self, doing: str) -> Iterator[None]:
        """Whatever fails here is said once and ends the logging, not the job."""
        try:
            yield
        except Exception as error:
            if not self._given_up:
                log.warning("W&B could not %s (%s); the job goes on without it", doing, short(error))
            self._given_up = True


def sweep_folder(folder: Path) -> Path | None:
    """The folder of the sweep that this is a job of; None outside a multirun.

    A launcher may start its jobs as runs of their own: what tells then is the file that Hydra's sweepers leave.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().runtime.cwd) / HydraConfig.get().sweep.dir
    above = list(folder.absolute().parents)[:DEPTH]
    return next((path for path in above if (path / "multirun.yaml").exists()), None)


def given_id(folder: Path) -> str:
    """The id that `wandb agent` or the user chose, or a new one; jobs of a sweep of ours never share one."""
    chosen = None if sweep_folder(folder) is not None else os.environ.get("WANDB_RUN_ID")
    return chosen or secrets.token_hex(4)
