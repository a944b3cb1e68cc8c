"""What a sweep has found: seeds together, settings that tell runs apart, and how each job stands."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from callbacks.sweep_plan import PlannedJob, SweepPlan, lease
from callbacks.sweep_report import keep_failure
from callbacks.sweep_results import read_sweep, settings_that_differ, spread
from tests.callbacks.sweeps import record, write


def test_seeds_are_grouped_and_settings_are_those_that_differ(tmp_path: Path) -> None:
    for number, generator in enumerate(("dsg", "zeroq")):
        for seed, top1 in enumerate((80.0, 81.0, 83.0)):
            write(tmp_path, f"{number}{seed}", record(generator=generator, seed=seed, top1=top1 + number))
    sweep = read_sweep(tmp_path)
    assert sweep.keys == ["generator"]  # not the steps that come with it, nor the calibration's seed, nor the folder
    assert [(s.label, s.seeds) for s in sweep.settings] == [
        ("generator=dsg", "0, 1, 2"),
        ("generator=zeroq", "0, 1, 2"),
    ]
    assert spread(sweep.settings[0].metrics("quantized")) == f"{statistics.mean([80, 81, 83]):.2f} ± 1.53"
    assert spread(sweep.settings[1].drops()) == "7.67 ± 1.53"


def test_a_value_that_no_option_explains_is_a_setting(tmp_path: Path) -> None:
    for steps in (100, 200):
        facts = record()
        facts["config"]["generator"]["steps"] = steps
        write(tmp_path, str(steps), facts)
    assert [s.label for s in read_sweep(tmp_path).settings] == ["generator.steps=100", "generator.steps=200"]


def test_what_only_watches_is_no_setting_unless_it_is_swept(tmp_path: Path) -> None:
    for export in ("none", "onnx"):
        facts = record()
        facts["choices"] |= {"export": export, "logger": export}
        write(tmp_path, export, facts)
    assert read_sweep(tmp_path).keys == []
    for export in ("none", "onnx"):
        facts = record()
        facts["choices"] |= {"export": export}
        facts["overrides"] += [f"export={export}", f"paths.store={export}"]
        write(tmp_path / "swept", export, facts)
    assert read_sweep(tmp_path / "swept").keys == ["export"]


def test_every_job_stands_where_it_stands(tmp_path: Path) -> None:
    names = ("done", "busy", "waits", "broke", "died", "vanished")
    jobs = [PlannedJob(name, [f"generator={name}"], f"{name}40") for name in names]
    jobs[-1].error = "killed by the scheduler"
    SweepPlan("study", [], jobs).write(tmp_path)
    write(tmp_path, "done", record(generator="done"))
    write(tmp_path, "busy", record(generator="busy", status="running"))
    write(tmp_path, "broke", record(generator="broke", status="failed", error="ValueError: no"))
    keep_failure(tmp_path / "died", RuntimeError("before there was a record"))
    write(tmp_path, "vanished", record(generator="vanished", status="running"))
    with lease(tmp_path).held(0):
        running = {run.name: (run.status, run.error) for run in read_sweep(tmp_path).runs}
    assert running == {
        "done": ("finished", None),
        "busy": ("running", None),
        "waits": ("waiting", None),
        "broke": ("failed", "ValueError: no"),
        "died": ("failed", "RuntimeError: before there was a record"),
        "vanished": ("failed", "killed by the scheduler"),
    }
    ended = read_sweep(tmp_path)
    assert {run.name: run.status for run in ended.runs if run.name in ("busy", "waits")} == {
        "busy": "interrupted",
        "waits": "not run",
    }
    assert ended.progress == "1 finished, 3 failed, 1 interrupted, 1 not run of 6"


def test_a_record_of_another_configuration_is_not_the_jobs(tmp_path: Path) -> None:
    SweepPlan("study", [], [PlannedJob("a", [], "new")]).write(tmp_path)
    write(tmp_path, "a", record())
    assert read_sweep(tmp_path).count("finished") == 0


def test_numbers_of_no_run() -> None:
    assert spread([]) == ""
    assert spread([-0.001]) == "0.00"
    assert settings_that_differ([]) == []


def test_no_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder: expected that of a sweep"):
        read_sweep(tmp_path)
