"""Search with Optuna on a job of no time: the space, seeds, several processes, a killed one, failures, pruning."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from hydra_plugins.calibrant_optuna._prune import Prune
from hydra_plugins.calibrant_optuna._results import Results
from hydra_plugins.calibrant_optuna._search import Search
from hydra_plugins.calibrant_optuna._space import Space, points, read_space
from hydra_plugins.calibrant_optuna._study import open_study, sampler_factory
from tests.command_line import call
from tests.configuration import CONF, ROOT, SMALL, composed, options

NO_LOADER: Any = SimpleNamespace(list_groups=lambda *_: [], get_group_options=lambda *_, **__: [])
SPACE = ["x=range(0,8)", "y=interval(-1,1)"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # what a journal does after each line


def space_of(arguments: Sequence[str]) -> Space:
    loader: ConfigLoader = NO_LOADER
    return read_space(arguments, loader)


def toy(overrides: dict[str, str]) -> float | list[float]:
    x, y = float(overrides.get("x", 0)), float(overrides.get("y", 0))
    loss = (x - 3) ** 2 + y**2
    return loss + (100.0 if overrides.get("effort") == "cheap" else 0.0)


def search(
    storage: Path,
    arguments: Sequence[str] = SPACE,
    job: Callable[[dict[str, str]], Any] = toy,
    *,
    sampler: str = "random",
    seed: int | None = 0,
    directions: Sequence[str] = ("minimize",),
    n_trials: int = 6,
    n_jobs: int = 1,
    **options: Any,
) -> optuna.Study:
    """What the plugin does, without Hydra around it."""
    space = space_of(arguments)
    study = open_study(str(storage / "study.journal"), "search", list(directions), space.distributions)
    study.sampler = sampler_factory(
        OmegaConf.load(CONF / f"hydra/sweeper/sampler/{sampler}.yaml"), space.distributions, seed
    )  # type: ignore[arg-type]

    def launch(batch: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        returned = []
        for overrides in batch:
            try:
                value, status = job(dict(text.split("=", 1) for text in overrides)), JobStatus.COMPLETED
            except Exception as error:
                value, status = error, JobStatus.FAILED
            returned.append(JobReturn(overrides=list(overrides), status=status, _return_value=value))
        return returned

    settings = {"launch": launch, "expect_legal": lambda overrides: None, "prune": None} | options
    results = Results(storage, study, None)
    Search(study, space, n_trials=n_trials, n_jobs=n_jobs, **settings).run(after_batch=results.write)
    return study


def params(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials if trial.state != optuna.trial.TrialState.FAIL]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("k=a,b", CategoricalDistribution(["a", "b"])),
        ("k=choice(zeroq,dsg)", CategoricalDistribution(["zeroq", "dsg"])),
        ("k=range(2,9)", IntDistribution(2, 8)),
        ("k=range(2,9,3)", IntDistribution(2, 8, step=3)),
        ("k=range(9,2,-3)", IntDistribution(3, 9, step=3)),
        ("k=range(0.1,0.5,0.1)", FloatDistribution(0.1, 0.4, step=0.1)),
        ("k=interval(1e-5,1e-3)", FloatDistribution(1e-5, 1e-3)),
        ("k=tag(log, interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("k=int(interval(1,8))", IntDistribution(1, 8)),
        ("k=tag(log, int(interval(1,8)))", IntDistribution(1, 8, log=True)),
    ],
)
def test_the_space_is_written_as_in_hydra(text: str, expected: Any) -> None:
    assert space_of([text]).distributions == {"k": expected}


def test_what_is_not_open_is_shared_and_the_later_word_counts() -> None:
    space = space_of(["a=1,2", "b=3", "a=4", "c=range(0,3)", "b=5,6"])
    assert space.fixed == {"a": "4"}
    assert list(space.distributions) == ["c", "b"]
    assert space.overrides({"c": 1, "b": "5"}) == {"a": "4", "c": "1", "b": "5"}


@pytest.mark.parametrize("text", ["a=1", "k=range(3,3)", "k=interval(2,1)", "k=tag(log,interval(0,1))"])
def test_an_empty_space_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="search space: expected"):
        space_of([text])


@given(st.integers(-5, 5), st.integers(1, 12), st.integers(1, 4))
def test_ranges_have_the_numbers_of_python(start: int, length: int, step: int) -> None:
    space = space_of([f"k=range({start},{start + length},{step})"])
    assert [point["k"] for point in points(space.distributions)] == list(range(start, start + length, step))


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsgaii"])
def test_a_seed_gives_the_same_search(sampler: str, tmp_path: Path) -> None:
    found = [
        params(search(tmp_path / name, sampler=sampler, seed=int(name[0]), n_trials=14)) for name in ("0a", "0b", "1")
    ]
    assert found[0] == found[1] != found[2]
    assert len({str(one) for one in found[0]}) > 7  # the seed is not the same for each trial


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_going_on_equals_going_through(sampler: str, tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", sampler=sampler, n_trials=14)
    for n_trials in (4, 9, 14, 14):
        parts = search(tmp_path / "parts", sampler=sampler, n_trials=n_trials)
        assert len(parts.trials) == n_trials
    assert params(whole) == params(parts)


def test_an_interrupted_trial_is_run_again_and_counts_once(tmp_path: Path) -> None:
    armed = [4]

    def job(overrides: dict[str, str]) -> float | list[float]:
        if len(seen := overrides["y"]) and armed and len(trials) == armed[0]:
            armed.clear()
            raise KeyboardInterrupt(seen)
        trials.append(overrides)
        return toy(overrides)

    trials: list[dict[str, str]] = []
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "broken", job=job, sampler="tpe", n_trials=14)
    again = search(tmp_path / "broken", job=job, sampler="tpe", n_trials=14)
    whole = search(tmp_path / "whole", sampler="tpe", n_trials=14)
    assert len(trials) == 14
    assert params(again) == params(whole)
    rows = list(csv.DictReader((tmp_path / "broken" / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["complete"] * 14


def test_a_search_finds_what_there_is_to_find(tmp_path: Path) -> None:
    study = search(tmp_path, sampler="tpe", n_trials=40)
    assert study.best_params["x"] == 3
    assert study.best_value < 0.1
    found: Any = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert (dict(found.best_params), found.best_value) == (study.best_params, study.best_value)


@pytest.mark.parametrize("n_jobs", [1, 4])
def test_a_grid_has_every_point_once(n_jobs: int, tmp_path: Path) -> None:
    study = search(tmp_path, ["x=range(0,3)", "y=0.5,1.5"], sampler="grid", n_trials=50, n_jobs=n_jobs)
    assert params(study) == [{"x": x, "y": y} for x in range(3) for y in ("0.5", "1.5")]


def test_a_grid_has_no_room_for_an_interval(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sampler: the grid expects choices or a range for y"):
        search(tmp_path, sampler="grid")


def test_the_front_of_two_objectives_is_that_of_all_trials(tmp_path: Path) -> None:
    study = search(
        tmp_path,
        job=lambda o: [toy(o), float(o["y"])],
        sampler="nsgaii",
        directions=("minimize", "maximize"),
        n_trials=30,
    )
    values = [trial.values for trial in study.trials]
    front = {
        (a, b) for a, b in values if not any((c <= a and d >= b) and (c, d) != (a, b) for c, d in values)
    }  # nothing is at least as good in both
    found: Any = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert {tuple(solution["values"]) for solution in found.solutions} == front
    assert 1 < len(front) < 30


def test_a_failing_trial_is_a_failed_trial(tmp_path: Path) -> None:
    def job(overrides: dict[str, str]) -> Any:
        if overrides["x"] in ("0", "2"):
            raise ValueError(f"no {overrides['x']}\nat all")
        return float("nan") if overrides["x"] == "1" else toy(overrides)

    study = search(tmp_path, ["x=range(0,5)"], job, sampler="grid", n_jobs=2)
    assert [trial.state.name for trial in study.trials] == ["FAIL", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    rows = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert rows[0]["error"] == "ValueError: no 0 at all"
    assert "finite" in rows[1]["error"]
    assert rows[3]["value"] == "0.0"


def test_a_launcher_that_gives_up_and_overrides_that_do_not_compose_fail_their_trials(tmp_path: Path) -> None:
    def launch(batch: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        if initial_job_idx == 1:
            raise RuntimeError("the queue is gone")
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=1.0) for _ in batch]

    def legal(overrides: list[str]) -> None:
        if overrides == ["x=2"]:
            raise ValueError("no such key")

    study = search(tmp_path, ["x=range(0,4)"], sampler="grid", launch=launch, expect_legal=legal)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]


def test_a_search_without_any_success_is_an_error(tmp_path: Path) -> None:
    study = search(tmp_path, job=lambda overrides: [][0], n_trials=2)
    loop = Search(study, space_of(SPACE), launch=list, expect_legal=list, n_trials=2, n_jobs=1, prune=None)
    with pytest.raises(RuntimeError, match="no trial succeeded; the last error: IndexError"):
        loop.expect_success()


def test_as_many_directions_as_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"direction: expected one for each number that a job returns \(2\)"):
        search(tmp_path, job=lambda overrides: [1.0, 2.0])


@pytest.mark.parametrize("changed", [{"arguments": ["x=range(0,9)"]}, {"directions": ["maximize"]}])
def test_another_search_does_not_go_on_with_the_study(changed: dict[str, Any], tmp_path: Path) -> None:
    search(tmp_path, n_trials=1)
    with pytest.raises(ValueError, match=r"as in the study|that of the study"):
        search(tmp_path, **changed)


def test_the_worse_half_of_the_cheap_runs_is_not_run_in_full(tmp_path: Path) -> None:
    ran: list[tuple[str, str]] = []

    def job(overrides: dict[str, str]) -> float | list[float]:
        ran.append((overrides["x"], overrides.get("effort", "full")))
        assert ("y" in overrides) == (overrides.get("effort") != "cheap")
        return toy(overrides)

    prune = {"overrides": ["effort=cheap"], "without": ["y"], "keep": 0.5, "startup": 3}
    study = search(tmp_path, ["x=range(0,8)", "y=0"], job, sampler="grid", prune=prune, n_jobs=3, n_trials=8)
    scores, kept = [(x - 3) ** 2 + 100.0 for x in range(8)], []
    for x, score in enumerate(scores):
        if x < 3 or score <= float(np.median(scores[:x])):
            kept.append(x)
    assert [int(x) for x, effort in ran if effort == "full"] == kept == [0, 1, 2, 3, 4]
    assert [int(x) for x, effort in ran if effort == "cheap"] == list(range(8))
    states = ["complete" if x in kept else "pruned" for x in range(8)]
    rows = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == states
    assert [float(row["cheap_score"]) for row in rows] == scores
    assert study.best_value == 0


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@given(scores=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), keep=st.floats(0.05, 1))
def test_the_best_is_never_pruned_and_the_first_neither(direction: str, scores: list[float], keep: float) -> None:
    prune = Prune(overrides=["effort=cheap"], keep=keep, startup=1)
    best = (min if direction == "minimize" else max)(scores)
    assert not prune.is_hopeless(best, scores, direction)
    assert not prune.is_hopeless(best, [], direction)


@pytest.mark.parametrize(
    "settings", [{"overrides": []}, {"overrides": ["a=1"], "keep": 0}, {"overrides": ["a=1"], "startup": 0}]
)
def test_settings_of_pruning(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="prune"):
        Prune(**settings)


def command(*arguments: str) -> list[str]:
    program = [sys.executable, str(ROOT / "tests/hydra_plugins/toy.py"), "--config-dir", str(CONF), "-m"]
    chosen = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.direction=minimize",
        "hydra.sweep.dir=study",
        "log=${hydra:runtime.cwd}/log",
    ]
    return [*program, *chosen, *arguments]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}


@pytest.mark.parametrize("storage", ["null", pytest.param("sqlite:///study.db", marks=pytest.mark.slow)])
def test_two_processes_share_a_study(storage: str, tmp_path: Path) -> None:
    grid = ["hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=100", f"hydra.sweeper.storage={storage}"]
    wanted = command(*grid, "x=range(0,5)", "y=0.5,1.5", "fails=4")
    both = [subprocess.Popen(wanted, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    ran = sorted((tmp_path / "log").read_text().split("\n")[:-1])
    assert ran == sorted(f"{x} {y} full" for x in range(5) for y in (0.5, 1.5))
    rows = list(csv.DictReader((tmp_path / "study" / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["fail" if row["x"] == "4" else "complete" for row in rows]
    assert len(list((tmp_path / "study").glob("trial_*"))) == 10


def test_workers_write_results_at_one_moment(tmp_path: Path) -> None:
    """The file that stands at the end has all trials, whichever worker came last; no lock or temporary file is left."""
    study = optuna.create_study()
    results = [Results(tmp_path, study, None) for _ in range(4)]

    def work(own: Results) -> None:
        for _ in range(10):
            study.tell(study.ask(), 1.0)
            own.write()

    with ThreadPoolExecutor(len(results)) as pool:
        list(pool.map(work, results))
    rows = list(csv.DictReader((tmp_path / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["complete"] * 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["optimization_results.yaml", "trials.csv"]


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    wanted = command("hydra.sweeper.n_trials=8", "x=range(0,8)", "y=interval(-1,1)", "armed=${hydra:runtime.cwd}/armed")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(wanted, cwd=tmp_path / "whole", env=ENVIRONMENT, check=True, timeout=60)
    ran = (tmp_path / "whole" / "log").read_text().splitlines()
    (tmp_path / "killed" / "armed").touch()
    there = [*wanted, f"kill={ran[4].split()[0]}"]
    assert subprocess.run(there, cwd=tmp_path / "killed", env=ENVIRONMENT, timeout=60).returncode == -9
    again = subprocess.run(there, cwd=tmp_path / "killed", env=ENVIRONMENT, timeout=60, capture_output=True, text=True)
    assert "1 interrupted trials are run again" in again.stdout + again.stderr
    assert set((tmp_path / "killed" / "log").read_text().splitlines()) == set(ran)
    results = [(tmp_path / name / "study" / "optimization_results.yaml").read_text() for name in ("whole", "killed")]
    assert results[0] == results[1]


def test_accuracy_against_size_with_the_main_job(tmp_path: Path) -> None:
    without = "hydra.sweeper.prune.without=[weight,reconstruction.iterations]"  # what a light run has no use for
    there = ["hydra.sweeper.n_trials=2", "hydra.sweep.dir=study", "paths.store=store"]
    done = call(tmp_path, *SMALL, "sweep=pareto", without, *there)
    assert done.returncode == 0, done.stderr
    assert "Pareto front" in done.stdout
    rows = list(csv.DictReader((tmp_path / "study" / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["complete"] * 2
    for row in rows:
        folder = tmp_path / "study" / f"trial_{int(row['trial']):04d}"
        record = json.loads((folder / "record.json").read_text())
        assert record["config"]["bits"]["weight"] == int(row["bits.weight"])
        assert float(row["size/bytes"]) == record["bytes"]["quantized"] == record["metrics"]["size/bytes"]
        assert float(row["test/quantized/top1"]) == record["metrics"]["test/quantized/top1"]
        cheap = json.loads((folder.with_name(f"{folder.name}_cheap") / "record.json").read_text())
        assert cheap["choices"]["pipeline"] == "light"
        assert float(row["cheap_score"]) == cheap["metrics"]["test/quantized/top1"]


SEARCHES = [name for name in options("sweep") if "optuna" in (CONF / "sweep" / f"{name}.yaml").read_text()]


@pytest.mark.parametrize("name", SEARCHES)
def test_both_ends_of_every_space_compose_in_full_and_cheaply(name: str, tmp_path: Path) -> None:
    sweeper: Any = OmegaConf.load(CONF / "sweep" / f"{name}.yaml").hydra.sweeper
    space = space_of([f"{key}={value}" for key, value in sweeper.params.items()])
    prune = Prune(**sweeper.prune)
    for end in (0, -1):
        own = space.overrides({key: ends(one)[end] for key, one in space.distributions.items()})
        for run in (own, prune.overrides(own)):
            cfg = composed([f"{key}={value}" for key, value in run.items()], tmp_path)
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def ends(one: Any) -> list[Any]:
    return list(one.choices) if isinstance(one, CategoricalDistribution) else [one.low, one.high]


def test_without_optuna_all_else_works_and_a_search_says_what_is_missing() -> None:
    script = """
import sys, warnings
warnings.simplefilter("error")
sys.modules["optuna"] = None
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf
Plugins.instance()
from hydra_plugins.calibrant_optuna.sweeper import OptunaSweeper
settings = OmegaConf.load(sys.argv[1])
chosen = {key: value for key, value in settings.items() if key not in ("defaults", "_target_", "_recursive_")}
try:
    OptunaSweeper(sampler=None, **chosen).sweep([])
except ImportError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(CONF / "hydra/sweeper/optuna.yaml")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert "pip install calibrant[search]" in done.stdout, done.stderr
