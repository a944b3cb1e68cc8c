"""Allocations through the whole job: searched, stored, saved, loaded, resumed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lightning_modules.allocation import read_bits
from run import run_job
from tests.configuration import SMALL, composed

QUICK = [
    *SMALL,
    "calibration=noise",
    "reconstruction=none",
    "protocol=zeroq",
    "weight=nearest_minmax",
    "activation=minmax",
]
PROGRAM = [*QUICK, "allocation=integer_program", "allocation.weight_bits=[2,4,8]"]

WIDTHS = ["bits.weight=3", "bits.activation=8"]


def run(overrides: list[str], folder: Path, store: Path | None = None) -> dict[str, Any]:
    cfg = composed(overrides, folder)
    if store is not None:
        cfg.paths.store = str(store)
    run_job(cfg)
    return json.loads((folder / "record.json").read_text())


def widths(folder: Path, kind: str) -> list[int]:
    rows = csv.DictReader((folder / "quantizers.csv").read_text().splitlines())
    return [int(row["bits"]) for row in rows if row["kind"] == kind]


@pytest.mark.parametrize("pipeline", [["pipeline=light"], ["pipeline=advanced", "corrections.bias_tuning.steps=2"]])
def test_the_papers_pipelines_take_an_allocation(pipeline: list[str], tmp_path: Path) -> None:
    search = ["allocation=integer_program", "allocation.weight_bits=[2,4,8]", "allocation.budget.average_bits=4"]
    facts = run([*SMALL, "calibration=noise", *pipeline, *search], tmp_path)
    assert facts["allocation"]["amounts"]["average_bits"] <= 4
    assert len(set(widths(tmp_path, "weight"))) > 1
    assert facts["corrections"][0]["correction"] == "bn_reestimation"


def test_a_searched_allocation_is_saved_drawn_and_loads_again(tmp_path: Path) -> None:
    program = [*PROGRAM, "allocation.method.count=3", "allocation.additivity=6", *WIDTHS]
    facts = run(program, tmp_path / "a", tmp_path / "store")
    found = facts["allocation"]
    assert (found["name"], found["hardware"]) == ("integer_program", "any")
    assert found["budgets"] == {"average_bits": 3.0}
    assert found["amounts"]["average_bits"] <= 3.0
    assert found["average_weight_bits"] <= 3.01
    assert found["size_fraction"] == pytest.approx(found["amounts"]["size"])
    best = max(found["tried"], key=lambda t: (t["agreement"], -t["divergence"]))
    assert len(found["tried"]) == 3
    assert best["sensitivity"] == found["amounts"]["sensitivity"]
    assert -1 <= found["additivity"]["spearman"] <= 1
    assert len(set(widths(tmp_path / "a", "weight"))) > 1
    assert set(widths(tmp_path / "a", "activation")) == {8}
    assert facts["row"]["allocation"] == "integer_program"
    assert facts["row"]["size_fraction"] == round(found["size_fraction"], 4)
    for name in ("allocation.yaml", "allocation.png", "sensitivities.csv", "additivity.csv"):
        assert (tmp_path / "a" / name).stat().st_size > 0, name
    path = tmp_path / "a" / "allocation.yaml"
    again = run([*QUICK, *WIDTHS, "allocation=from_file", f"allocation.path={path}"], tmp_path / "b")
    assert again["row"]["allocation"] == "from_file"
    assert again["metrics"] == facts["metrics"]
    first, second = (load_file(tmp_path / name / "student.safetensors") for name in ("a", "b"))
    assert all((first[key] == second[key]).all() for key in first)
    scored = composed([*program, f"evaluate={tmp_path / 'a'}"], tmp_path / "scored")
    assert run_job(scored)["test/quantized/top1"] == facts["metrics"]["test/quantized/top1"]


def test_a_refined_allocation_diverges_least_of_what_was_tried(tmp_path: Path) -> None:
    refined = [o.replace("integer_program", "calibrant") for o in PROGRAM]
    facts = run([*refined, *WIDTHS], tmp_path / "a", tmp_path / "store")
    found, plain = facts["allocation"], run([*PROGRAM, *WIDTHS], tmp_path / "b", tmp_path / "store")["allocation"]
    assert (found["name"], plain["name"]) == ("calibrant", "integer_program")
    assert len(found["tried"]) >= 2
    first, best = found["tried"][0], min(found["tried"], key=lambda tried: tried["divergence"])
    assert first["sensitivity"] == plain["amounts"]["sensitivity"]  # it starts at the program's solution
    assert best["sensitivity"] == found["amounts"]["sensitivity"]
    assert found["amounts"]["average_bits"] <= 3.0
    again = run([*refined, *WIDTHS], tmp_path / "c", tmp_path / "store")
    assert again["allocation"]["tried"] == found["tried"]  # from the store now, the rounds' measurements too


def test_sensitivities_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run([*PROGRAM, "allocation.budget.size=0.2"], tmp_path / "a", tmp_path / "store")

    def fail(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("allocation.sensitivity.OutputSensitivity.of_group", fail)
    monkeypatch.setattr("lightning_modules.stored_sensitivity.Bench._swaps", fail)
    second = run([*PROGRAM, "allocation.budget.size=0.15", "seed=0"], tmp_path / "b", tmp_path / "store")
    amounts = [facts["allocation"]["amounts"] for facts in (first, second)]
    assert amounts[1]["size"] <= 0.15 < amounts[0]["size"] <= 0.2
    assert amounts[0]["sensitivity"] <= amounts[1]["sensitivity"]
    assert [facts["data_free"] for facts in (first, second)] == [True, True]


@pytest.mark.parametrize(
    "options",
    [
        ["allocation=greedy", "allocation.weight_bits=[2,4]", "allocation.activation_bits=same", "allocation.images=4"],
        ["allocation/sensitivity=reconstruction", "hardware=powers_of_two", "allocation.activation_bits=[2,8]"],
        ["allocation/sensitivity=hessian", "allocation.sensitivity.probes=2", "protocol=brecq"],
        ["allocation/sensitivity=sqnr", "allocation.minimize=size", "allocation.budget.sensitivity=0.5"],
        ["hardware=int4_int8", "bits=w4a8", "corrections=equalization", "allocation.budget.energy=50"],
    ],
    ids=lambda options: options[0],
)
def test_every_way_of_searching_runs(options: list[str], tmp_path: Path) -> None:
    facts = run([*PROGRAM, *options], tmp_path)
    found = facts["allocation"]
    assert all(found["amounts"][name] <= amount * (1 + 1e-9) for name, amount in found["budgets"].items())
    pairs = read_bits(tmp_path / "allocation.yaml").values()
    if "hardware=int4_int8" in options:
        assert {weight for weight, _ in pairs} <= {4, 8}
        assert [entry["correction"] for entry in facts["corrections"]] == ["equalization"]
    if "allocation.activation_bits=same" in options:
        assert all(weight == activation for weight, activation in pairs if activation != 32)


def test_the_smallest_network_that_keeps_the_agreement(tmp_path: Path) -> None:
    facts = run([*PROGRAM, "allocation.keep_top1=30", "bits.activation=8"], tmp_path)
    tried, size = facts["allocation"]["tried"], facts["allocation"]["amounts"]["size"]
    assert min(t["size"] for t in tried if t["agreement"] >= 70) == size
    assert any(t["agreement"] < 70 or t["size"] == size for t in tried)


def test_a_network_that_cannot_keep_the_agreement_is_refused(tmp_path: Path) -> None:
    small = [*PROGRAM, "allocation.keep_top1=0", "allocation.weight_bits=[2]", "bits.activation=2"]
    with pytest.raises(ValueError, match=r"keep_top1.*loses at most 0 points.*largest loses"):
        run(small, tmp_path / "b")
    with pytest.raises(ValueError, match=r"judge: top1 expects labelled images"):
        run([*small, "allocation.judge=top1"], tmp_path / "c")


def test_labelled_images_allow_the_papers_loss(tmp_path: Path) -> None:
    labelled = [*PROGRAM, "calibration=real", "allocation/sensitivity=loss", "allocation.keep_top1=50"]
    facts = run([*labelled, "allocation.judge=top1"], tmp_path)
    assert "top1" in facts["allocation"]["tried"][0]


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    nothing = [o for o in PROGRAM if not o.startswith("calibration")]
    with pytest.raises(ValueError, match=r"allocation: expected uniform or from_file with calibration=none"):
        run([*nothing, "calibration=none"], tmp_path / "a")
    with pytest.raises(ValueError, match=r"allocation\.budget\.size: expected at least 0\.\d+, got 0\.01"):
        run([*PROGRAM, "allocation.budget.size=0.01"], tmp_path / "b")
    with pytest.raises(ValueError, match=r"allocation\.path.*got none"):
        run([*QUICK, "allocation=from_file"], tmp_path / "c")
    with pytest.raises(ValueError, match=r"latency_table: expected a csv or json"):
        run([*PROGRAM, "allocation.budget.latency=1"], tmp_path / "d")
    (tmp_path / "other.yaml").write_text("bits: {nowhere: [4, 4]}\n")
    with pytest.raises(ValueError, match=r"expected paths of layers"):
        run([*QUICK, "allocation=from_file", f"allocation.path={tmp_path / 'other.yaml'}"], tmp_path / "e")
    (tmp_path / "other.yaml").write_text("bits: {fc: 4}\n")
    with pytest.raises(ValueError, match=r"expected \[weight bits, activation bits\] of fc"):
        read_bits(tmp_path / "other.yaml")


def test_a_killed_run_keeps_its_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed(PROGRAM, tmp_path)

    def stop(*arguments: Any) -> None:
        raise InterruptedError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("run.set_ranges", stop)
        with pytest.raises(InterruptedError):
            run_job(cfg)
    before = (tmp_path / "allocation.yaml").read_text()
    cfg.resume = str(tmp_path)
    monkeypatch.setattr("lightning_modules.allocation_search.Search.find", stop)
    run_job(cfg)
    facts = json.loads((tmp_path / "record.json").read_text())
    assert (tmp_path / "allocation.yaml").read_text() == before
    assert facts["row"]["allocation"] == "integer_program"
    assert facts["allocation"]["amounts"]["average_bits"] <= 4
