"""A sweep's plan: names of folders, what is recognised as done, and what is set aside."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbacks.sweep_plan import (
    PLAN,
    PlannedJob,
    SweepPlan,
    folder_name,
    is_running,
    last_sweep,
    lease,
    read_plan,
    recognise,
    set_aside,
)
from tests.callbacks.sweeps import record, write
from tests.synthesis.test_leases import left_abroad

OVERRIDES = ["generator=dsg", "bits=w4a4", "seed=0", "data.root=/a/b", "+generator.slack={a: 1, b: 2}"]


@given(st.permutations(OVERRIDES))
def test_a_folder_is_named_whatever_the_order(overrides: list[str]) -> None:
    name = folder_name(overrides, ["generator", "bits", "seed"])
    assert name == folder_name(OVERRIDES, ["generator", "bits", "seed"])
    assert name.startswith("w4a4-dsg-0-")


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_a_folder_has_a_name_that_every_file_system_and_shell_takes(values: list[str]) -> None:
    overrides = [f"key{i}={value}" for i, value in enumerate(values)]
    name = folder_name(overrides, [f"key{i}" for i in range(len(values))])
    assert len(name) <= 70
    assert name == Path(name).name
    assert not name.startswith((".", "-"))
    assert not set(name) & set("=,'\"[]{}()$ /\\:*?<>|\n")


def test_other_overrides_give_other_names_and_the_sweeps_own_do_not() -> None:
    names = {folder_name([f"bits={b}", f"seed={s}"], []) for b, s in itertools.product("abc", "012")}
    assert len(names) == 9
    assert folder_name(["seed=0", "sweep.resume=true", "hydra.sweep.dir=x"], []) == folder_name(["seed=0"], [])


def test_a_record_is_a_jobs_by_the_hash_of_its_configuration() -> None:
    records = {"0": record(seed=0), "1": record(seed=1), "2": record(seed=2, status="running")}
    jobs = [PlannedJob("a", ["x"], hash_) for hash_ in ("dsg40", "dsg42", "dsg43")]
    assert recognise(jobs, records) == {0: "0", 1: "2"}


def test_jobs_of_one_hash_are_told_apart_by_their_overrides() -> None:
    records = {"0": record(overrides=["export=none"])}
    jobs = [PlannedJob("a", ["export=none"], "dsg40"), PlannedJob("b", ["export=onnx"], "dsg40")]
    assert recognise(jobs, records) == {0: "0"}


def test_a_record_with_the_export_that_is_asked_for_counts(tmp_path: Path) -> None:
    records = {"0": record(), "1": record()}
    records["1"]["config"]["export"] = {"container": "int8"}
    wanted = PlannedJob("a", [], "dsg40", export={"container": "int8"})
    assert recognise([wanted], records) == {0: "1"}
    assert [wanted.is_done(records[name]) for name in "01"] == [False, True]
    assert recognise([PlannedJob("a", [], "dsg40")], records) == {0: "0"}
    switch = {"container": "int8", "openvino": False}  # an option that the record is older than
    assert PlannedJob("a", [], "dsg40", export=switch).is_done(records["1"])
    assert not PlannedJob("a", [], "dsg40", export=switch | {"openvino": True}).is_done(records["1"])


def test_the_finished_one_of_two_records_counts() -> None:
    records = {"0": record(status="failed"), "1": record()}
    assert recognise([PlannedJob("a", [], "dsg40")], records) == {0: "1"}


def test_the_last_sweep_of_the_same_line_goes_before_the_last_of_the_name(tmp_path: Path) -> None:
    for age, (name, line) in enumerate((("study", ["a=1", "b=2"]), ("study", ["a=1"]), ("other", ["b=3"]))):
        SweepPlan(name, [line]).write(tmp_path / str(age))
        os.utime(tmp_path / str(age) / PLAN, (age, age))
    assert last_sweep(tmp_path, "study", ["b=2", "a=1"]) == tmp_path / "0"
    assert last_sweep(tmp_path, "study", ["c=1"]) == tmp_path / "1"
    assert last_sweep(tmp_path, "third", ["c=1"]) is None


def test_without_a_name_the_keys_tell_which_sweep_is_meant(tmp_path: Path) -> None:
    params = "hydra.sweeper.params.bits=4,2"
    for age, line in enumerate((["a=1,2", "b=2"], ["a=choice(1,2)", "b=3"], [params])):
        SweepPlan("default", [line]).write(tmp_path / str(age))
        os.utime(tmp_path / str(age) / PLAN, (age, age))
    assert last_sweep(tmp_path, "default", ["b=2", "a=1,2,3"]) == tmp_path / "0"
    assert last_sweep(tmp_path, "default", ["b=3", "a=1,2,3"]) == tmp_path / "1"
    assert last_sweep(tmp_path, "default", ["bits=4,3,2"]) == tmp_path / "2"
    for other in (["a=1,2,3"], ["a=1,2,3", "b=4"], ["a=1", "b=2"], ["c=1,2", "b=2"], []):
        assert last_sweep(tmp_path, "default", other) is None


def test_what_is_set_aside_is_kept_and_counts_no_more(tmp_path: Path) -> None:
    for _ in range(2):
        write(tmp_path, "a", record())
        set_aside(tmp_path, "a")
        assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob("**/record.json"))
    kept = sorted(tmp_path.glob("superseded/*/record_superseded.json"))
    assert [json.loads(path.read_text())["status"] for path in kept] == ["finished"] * 2
    set_aside(tmp_path, "none")
    write(tmp_path, "of/a/study", record())
    set_aside(tmp_path, "of/a/study")
    assert (tmp_path / "superseded" / "of" / "a" / "study" / "record_superseded.json").exists()


def test_plan_round_trip_and_who_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = SweepPlan("study", [["a=1"]], [PlannedJob("x", ["a=1"], "h", "failed", "no")])
    plan.write(tmp_path)
    assert read_plan(tmp_path) == plan
    assert not is_running(tmp_path)
    with lease(tmp_path).held(0):
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
    left_abroad(lease(tmp_path), monkeypatch, silent_for=590)
    assert is_running(tmp_path)
    os.utime(tmp_path / "sweep.lock", (1.0, 1.0))  # of a host that is gone
    assert not is_running(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PLAN]
