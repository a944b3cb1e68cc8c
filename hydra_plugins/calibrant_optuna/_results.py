"""What a search found: `optimization_results.yaml`, `trials.csv`, and a table."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from deployment.whole_file import whole_file
from hydra_plugins.calibrant_optuna._search import CHEAP, ERROR
from hydra_plugins.calibrant_optuna._study import discarded
from synthesis.leases import Lease

SHOWN = 10  # best trials where there is one objective
SILENCE = 60.0  # seconds after which a worker on another host that writes the results is taken for dead


class Results:
    """The trials of a study in the sweep's folder.

    Args:
        folder: of the sweep.
        study: with its trials.
        names: of the objectives, as `optimized_metric` has them; None: `value`.
    """

    def __init__(self, folder: Path, study: Study, names: Any) -> None:
        self.folder = folder
        self.study = study
        chosen = list(names) if isinstance(names, ListConfig | list | tuple) else [names or "value"]
        several = len(study.directions) != len(chosen)  # the job returns more than `optimized_metric` tells
        self.names = [f"value_{i}" for i in range(len(study.directions))] if several else [str(name) for name in chosen]

    def write(self) -> None:
        """Write both files, by a temporary name and a rename.

        Workers that share a study end at about one moment. Each reads the study and writes in its turn, lest the files
        of the one that read first stand at the end.
        """
        with Lease(self.folder / ".results.lock", SILENCE).held(2 * SILENCE):
            self._write()

    def _write(self) -> None:
        ignored = discarded(self.study)
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if trial.number not in ignored]
        by_state = {state.name.lower(): 0 for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)}
        for trial in trials:
            if trial.state.is_finished():
                by_state[trial.state.name.lower()] += 1
        found: dict[str, Any] = {"name": "optuna", "study": self.study.study_name, "trials": by_state}
        best = self.best()
        if len(self.names) == 1:
            found |= {"best_params": best[0].params, "best_value": best[0].value} if best else {}
        else:
            solutions = [{"trial": one.number, "params": one.params, "values": list(one.values)} for one in best]
            found |= {"objectives": self.names, "solutions": solutions}
        self._replace("optimization_results.yaml", OmegaConf.to_yaml(OmegaConf.create(found)))
        self._write_trials(trials)

    def _write_trials(self, trials: list[FrozenTrial]) -> None:
        parameters = list(dict.fromkeys(key for trial in trials for key in trial.params))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "state", *self.names, CHEAP, "seconds", *parameters, ERROR])
        for trial in trials:
            values = trial.values if trial.state == TrialState.COMPLETE else [None] * len(self.names)
            seconds = None if trial.duration is None else round(trial.duration.total_seconds(), 3)
            own = [trial.params.get(key) for key in parameters]
            attributes = trial.user_attrs
            row = [trial.number, trial.state.name.lower(), *values, attributes.get(CHEAP), seconds, *own]
            writer.writerow([*row, attributes.get(ERROR)])
        self._replace("trials.csv", text.getvalue())

    def best(self) -> list[FrozenTrial]:
        """The trials that no other beats in all objectives, or, of one objective, all from the best on."""
        if len(self.names) > 1:
            return sorted(self.study.best_trials, key=lambda trial: trial.values)
        falling = self.study.direction == StudyDirection.MAXIMIZE
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return sorted(complete, key=lambda trial: float(trial.value or 0.0), reverse=falling)

    def show(self) -> None:
        """Print the best trials, or the Pareto front."""
        self.write()
        best = self.best()
        several = len(self.names) > 1
        table = Table(title="Pareto front" if several else "best trials", caption=f"all of them in {self.folder}")
        parameters = list(dict.fromkeys(key for trial in best for key in trial.params))
        for name in ("trial", *self.names, *parameters):
            table.add_column(name, justify="right", overflow="fold")
        for trial in best if several else best[:SHOWN]:
            cells = [*trial.values, *(trial.params.get(key, "") for key in parameters)]
            table.add_row(str(trial.number), *(f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells))
        Console().print(table)

    def _replace(self, name: str, text: str) -> None:
        with whole_file(self.folder / name, several=True) as temporary:
            temporary.write_text(text, newline="")
