"""Results files: rows of finished runs, what they changed, and what is replaced when it is measured again."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from benchmarks.readme_tables import SETTING, cells, method, part_changed, pivot
from benchmarks.table import add, arguments, changes, collect, merge, part, planned, read_rows, replaces, spelled
from callbacks.report import result_row
from tests.configuration import ROOT, composed

ROW = {"network": "n", "seed": 0, "config_hash": "a", "top1": 90.0, "experiment": "none", "overrides": ""}
EXPERIMENT = {
    "model": "cifar10_resnet20",
    "data": "cifar10",
    "calibration": "synthetic_256",
    "generator": "dsg_fast",
    "protocol": "brecq",
    "bits": "w4a4",
    "weight": "adaround",
    "activation": "lsq",
    "reconstruction": "fast",
    "trainer": "cpu",
    "experiment": "cifar10_resnet20_dsg_w4a4",
}


def facts(*overrides: str, origin: str = "synthetic", **choices: str) -> dict[str, Any]:
    """A record of the CIFAR experiment with these overrides, as a run of it leaves it."""
    chosen = EXPERIMENT | choices
    options = [f"{group}={option}" for group, option in choices.items()]
    cfg = composed([f"experiment={chosen['experiment']}", *options, *overrides])
    metrics = {f"test/{name}/top1": 91.73 for name in ("float", "nearest", "quantized")}
    return {
        "status": "finished",
        "config": OmegaConf.to_container(cfg, resolve=True),
        "config_hash": "of other defaults",
        "choices": chosen,
        "overrides": [f"experiment={chosen['experiment']}", *options, *overrides],
        "images": {"origin": origin, "count": cfg.calibration.count, "from_store": False},
        "teacher": {"name": "cifar10_resnet20"},
        "metrics": metrics | {"test/quantized/agreement": 96.0, "test/quantized/kl": 0.05},
        "stages": {"images": {"seconds": 1.0, "peak_mib": 2.0}},
        "machine": "m",
        "commit": "c",
        "started": "2026-01-01T00:00:00",
        "test_images": 10000,
    }


def collected(folder: Path, *records: dict[str, Any]) -> list[dict[str, Any]]:
    for index, record in enumerate(records):
        (folder / str(index)).mkdir(parents=True, exist_ok=True)
        record = record | {"row": result_row(record)}
        (folder / str(index) / "record.json").write_text(json.dumps(record))
    return collect(folder)


def test_what_the_command_line_asks_for_beyond_options_and_places() -> None:
    found = spelled(
        ["bits=w4a4", "generator.sda=false", "paths.store=x", "seed=1", "generator.lse=true", "show.units=false"]
    )
    assert found == "generator.lse=true generator.sda=false"
    assert spelled(["calibration=real_1024", "calibration=none_aciq"]) == "calibration=none_aciq"
    assert spelled(["model.checkpoint=/home/me/a.pth", "generator.view.scale=[0.1, 1]"]) == (
        "generator.view.scale=[0.1,1] model.checkpoint=a.pth"
    )


def test_changes_are_those_of_the_experiment_too() -> None:
    assert changes(facts()) == "generator.slack.percentile=0.25 generator.steps=250 reconstruction.iterations=600"
    assert changes(facts("generator.lse=false", "bits.weight=3", "seed=1", "calibration.count=9")) == (
        "generator.lse=False generator.slack.percentile=0.25 generator.steps=250 reconstruction.iterations=600"
    )
    real = facts("paths.data=elsewhere", calibration="real_1024", origin="real")
    assert changes(real) == "reconstruction.iterations=600"


def test_what_an_option_takes_from_elsewhere_is_no_change_and_an_unusual_choice_of_images_is_one() -> None:
    # uniform_noise holds ${model.mean}, noise images ${seed}
    assert "source" not in changes(facts("generator.steps=0", "seed=3", generator="uniform_noise"))
    assert "seed" not in changes(facts("seed=3", calibration="noise", origin="noise"))
    assert "calibration.seed=7" in changes(facts("calibration.seed=7", calibration="noise", origin="noise"))


def test_finished_runs_are_collected_and_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "record.json").write_text(json.dumps({"status": "failed", "error": "ValueError: no"}))
    (row,) = collected(tmp_path, facts("generator.lse=false"))
    assert (row["experiment"], row["generator_steps"], row["iterations"]) == ("cifar10_resnet20_dsg_w4a4", 250, 600)
    assert row["overrides"] == "generator.lse=false"
    assert "generator.lse=False generator.slack.percentile=0.25" in row["changes"]
    assert "left out: 1: ValueError: no" in capsys.readouterr().err


def test_measuring_again_replaces_a_row_and_new_columns_stay_empty_in_old_ones() -> None:
    old = [{key: str(value) for key, value in ROW.items()}, {**ROW, "seed": "1"}]
    merged = merge(old, [ROW | {"top1": 91.0, "config_hash": "b", "changes": "x"}])
    assert [(row["seed"], row["top1"], row["changes"]) for row in merged] == [("1", 90.0, ""), (0, 91.0, "x")]


@pytest.mark.parametrize(
    "other", [{"experiment": "e"}, {"overrides": "generator.sda=false"}, {"weight": "flexround"}, {"seed": 1}]
)
def test_a_row_of_another_command_stays(other: dict[str, Any]) -> None:
    assert len(merge([ROW], [ROW | other])) == 2
    assert len(merge([ROW | other], [ROW])) == 2


def test_another_spelling_of_the_same_settings_replaces_a_row() -> None:
    old = ROW | {"overrides": "weight.lr=0.0001 a.b=16", "changes": "a.b=16"}  # from before that rate was the default
    assert len(merge([old], [ROW | {"overrides": "a.b=16", "changes": "a.b=16"}])) == 1
    assert len(merge([old], [ROW | {"overrides": "a.b=16", "changes": "a.b=16 weight.lr=0.0002"}])) == 2
    assert len(merge([old | {"changes": ""}], [ROW | {"overrides": "a.b=16", "changes": ""}])) == 2  # not known


def test_the_rows_of_the_cifar_file_are_replaced_by_a_rerun_of_their_command(tmp_path: Path) -> None:
    old = read_rows(ROOT / "benchmarks" / "results" / "cifar10.csv")
    records = []
    for option, origin in (("synthetic_256", "synthetic"), ("real_1024", "real"), ("noise_256", "noise")):
        record = facts("paths.data=elsewhere", calibration=option, origin=origin)
        for (weight, activation), seed in itertools.product(((4, 4), (3, 3), (2, 4)), range(3)):
            bits = record["config"]["bits"] | {"weight": weight, "activation": activation}
            records.append(record | {"config": record["config"] | {"bits": bits, "seed": seed}})
    rows = collected(tmp_path, *records)
    again = merge(old, rows)
    assert len(old) == len(again) == 27
    assert all(row["config_hash"] == "of other defaults" for row in again)
    assert len(merge(again, rows)) == 27


def test_rows_from_before_are_told_apart_by_what_their_command_line_set() -> None:
    old = {"network": "n", "seed": "0", "changes": "generator.sda=false"}
    assert replaces(ROW | {"overrides": "generator.sda=false", "changes": "generator.sda=False x.y=1"}, old)
    assert not replaces(ROW, old)
    assert not replaces(ROW | {"overrides": "generator.sda=false"}, {"network": "n", "seed": "0"})


def test_a_table_tells_lengths_and_what_was_changed() -> None:
    row = dict.fromkeys(SETTING, "") | {"network": "n", "protocol": "p", "w_bits": "4", "a_bits": "8"}
    row |= {"images": "dsg_fast", "image_count": "256", "pipeline": "fast", "iterations": "600"}
    assert cells(row) == ["n", "p", "W4A8", "256 dsg_fast", "", "fast, 600 its"]  # from before there were steps
    row |= {"generator_steps": "250", "weight": "adaround", "activation": "lsq"}
    row |= {"changes": "generator.slack.percentile=0.25 generator.steps=250 reconstruction.iterations=600"}
    assert cells(row)[3:] == [
        "256 dsg_fast, 250 steps, `generator.slack.percentile=0.25`",
        "adaround, lsq",
        "fast, 600 its",
    ]
    noise = row | {"images": "none", "generator_steps": "0", "pipeline": "none", "changes": ""}
    assert cells(noise)[3:] == ["256 none", "adaround, lsq", "none"]


def test_plan_is_one_sweep_a_line_without_comments_and_blank_lines():
    text = "# all\na=1,2 b=x  # note\n\nc=3\n"

    assert planned(text) == [["a=1,2", "b=x"], ["c=3"]]


def test_parts_of_a_plan_are_the_whole_and_no_line_twice():
    text = "\n".join(f"seed={i}" for i in range(7))

    dealt = [planned(text, (i, 3)) for i in (1, 2, 3)]

    assert sorted(itertools.chain(*dealt)) == planned(text)
    assert [len(lines) for lines in dealt] == [3, 2, 2]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_part_that_is_none_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="expected i/n"):
        part(text)


@pytest.mark.parametrize("options", [[], ["--plan"], ["--plan", "--part", "2/3"]])
def test_everything_behind_the_dashes_goes_to_the_run(options: list[str]):
    read = arguments(["name", *options, "--", "-m", "seed=0,1"])

    assert read.name == "name"
    assert read.overrides == ["-m", "seed=0,1"]
    assert read.part == ((2, 3) if "--part" in options else (1, 1))


def test_rows_added_one_after_another_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.table.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.table.ROOT", tmp_path)

    add("some", [ROW])
    add("some", [ROW | {"seed": 1}])

    assert [row["seed"] for row in read_rows(tmp_path / "some.csv")] == ["0", "1"]


def alone(line: list[str]) -> list[list[str]]:
    """A sweep's line with every swept value once, the others at their first."""
    parsed = OverridesParser.create().parse_overrides(line)
    values = [list(o.sweep_string_iterator()) if o.is_sweep_override() else [o.get_value_string()] for o in parsed]
    keys = [line[i].split("=")[0] for i in range(len(line))]
    first = [choices[0] for choices in values]
    rows = {(*first[:i], choice, *first[i + 1 :]) for i, choices in enumerate(values) for choice in choices}
    return [[f"{key}={value}" for key, value in zip(keys, row, strict=True)] for row in sorted(rows)]


LINES = [
    (path.stem, line)
    for path in sorted((ROOT / "benchmarks/plans").glob("*.txt"))
    for line in planned(path.read_text())
]


@pytest.mark.parametrize(("name", "line"), LINES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(LINES)])
def test_every_job_of_a_plan_composes(name: str, line: list[str]):
    for overrides in alone(line):
        composed(overrides)


def test_pivot_has_a_row_a_method_a_column_a_width_and_marks_the_best():
    common = {"changes": "generator.steps=200", "recipe": "none", "pipeline": "fast", "corrections": "none"}
    common |= {"w_bits": "3", "a_bits": "3", "images": "dsg", "images_from_store": "True", "seconds": "20.0"}
    common |= {"machine": "one"}
    rows = [
        common | {"weight": "adaround", "top1": "88.00"},
        common | {"weight": "adaround", "top1": "89.00"},
        common | {"weight": "adaround", "top1": "91.50", "w_bits": "8", "a_bits": "8"},
        common
        | {
            "weight": "flexround",
            "top1": "88.40",
            "changes": "reconstruction.drop=0.0 weight.lr=1e-4",
            "machine": "two",
        },
        common | {"weight": "nearest", "top1": "80.00", "pipeline": "none", "images": "real"},
    ]

    head, _, *lines = pivot(rows)

    assert head == "| method | W8A8 dsg | W8A8 real | W3A3 dsg | W3A3 real | seconds |"
    assert lines == [
        "| adaround, block | **91.50** |  | **88.50 ± 0.71** |  | 20 |",
        "| flexround, block, no drop |  |  | 88.40 |  |  |",
        "| nearest |  |  |  | **80.00** | 20 |",
    ]
    diverging = pivot([row | {"kl": "0.2"} for row in rows])[2:]
    assert [line.replace(", KL 0.200", "") for line in diverging] == lines
    assert "**88.50 ± 0.71**, KL 0.200" in diverging[0]
    assert pivot([rows[0] | {"kl": "0.2"}, *rows[1:]])[2:] == lines  # where some lack it, it compares nothing


def test_a_pipeline_with_a_part_exchanged_has_a_row_of_its_own():
    row = {"recipe": "calibrant_fast", "weight": "adaquant", "activation": "lsq", "pipeline": "calibrant"}
    row |= {"changes": "", "overrides": "", "corrections": "none"}
    assert method(row) == "pipeline calibrant_fast"
    assert method(row | {"pipeline": "qdrop"}) == "pipeline calibrant_fast, qdrop"
    changed = row | {"recipe": "calibrant", "weight": "flexround", "activation": "lsq_plus"}
    assert method(changed) == "pipeline calibrant, flexround, lsq_plus"
    squared = {"overrides": "reconstruction/objective=mse", "changes": "reconstruction.objective.p=2.0"}
    assert method(row | squared) == "pipeline calibrant_fast, reconstruction/objective=mse"
    assert method(row | {"corrections": "network_polish"}) == "pipeline calibrant_fast, network_polish"
    light = {"recipe": "light", "weight": "nearest_minmax", "activation": "sample_minmax", "pipeline": "none"}
    assert method(row | light) == "pipeline light, without corrections"
    assert method(row | light | {"corrections": "bn_reestimation+bias_correction"}) == "pipeline light"


def test_a_part_of_a_pipeline_says_whether_rates_are_absolute():
    row = {"weight": "adaquant", "activation": "lsq", "pipeline": "qdrop", "iterations": "60", "corrections": "none"}
    row |= {"changes": "activation.relative=True", "overrides": "data.limit=1000 reconstruction/objective=fisher"}
    assert part_changed(row) == "adaquant, qdrop, 60 steps, objective=fisher"
    row |= {"changes": "reconstruction.bias_lr=0.0001", "overrides": "activation.relative=False activation.lr=4e-05"}
    assert part_changed(row) == "adaquant, qdrop, 60 steps, biases, absolute rates, activation.lr=4e-05"


def test_no_script_has_the_name_of_a_package():
    """`python benchmarks/table.py` looks for `deployment` among the scripts first."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"run", "commands"}
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__"}
    assert {"deployment", "callbacks"} <= packages
    assert not scripts & packages
