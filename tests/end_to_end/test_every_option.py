"""Every option of the groups that say how a student is made and learned goes through the whole job."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from callbacks.report import result_row
from run import run_job
from tests.configuration import CONF, SMALL, choosing, composed, options
from tests.saved_students import student

NOISE = [*SMALL, "calibration=noise"]
STRAIGHT = ["weight=adaquant_minmax"]  # the default, AdaRound, is decided by a regularizer that these have not
GOES_WITH = {  # reconstructions that need a weight quantizer of their own
    "closed_form": ["weight=gptq"], "adaquant": STRAIGHT, "adaquant_parallel": STRAIGHT, "adaquant_published": STRAIGHT,
}  # fmt: skip


def quantizers(folder: Path) -> list[dict[str, str]]:
    with (folder / "quantizers.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("reconstruction", options("reconstruction"))
def test_every_reconstruction_runs(reconstruction: str, tmp_path: Path) -> None:
    cfg: DictConfig = composed(
        [*NOISE, f"reconstruction={reconstruction}", *GOES_WITH.get(reconstruction, [])], tmp_path
    )
    assert 0 <= run_job(cfg)["test/quantized/top1"] <= 100
    assert (tmp_path / "units.csv").exists() == (cfg.reconstruction.phases != "none")
    assert json.loads((tmp_path / "record.json").read_text())["row"]["pipeline"] is None  # a name only below Hydra


@pytest.mark.parametrize("pipeline", options("pipeline"))
def test_every_pipeline_runs_and_says_what_it_chose(pipeline: str, tmp_path: Path) -> None:
    short = ["corrections.bias_tuning.steps=2"] if pipeline == "advanced" else []
    cfg = composed([*NOISE, f"pipeline={pipeline}", *short], tmp_path)
    assert 0 <= run_job(cfg)["test/quantized/top1"] <= 100
    facts = json.loads((tmp_path / "record.json").read_text())
    assert [entry["correction"] for entry in facts["corrections"]] == list(cfg.corrections)
    row = result_row(facts | {"choices": {"pipeline": pipeline, "reconstruction": "x"}})
    assert (row["recipe"], row["pipeline"]) == (pipeline, "x")
    assert result_row(facts | {"choices": {"pipeline": "None"}})["recipe"] == "none"


def test_a_pipeline_goes_before_what_an_experiment_chose() -> None:
    cfg = composed(["experiment=cifar10_resnet20_ranges", "pipeline=qdrop"])
    alone = composed(["pipeline=qdrop"])
    assert all(cfg[group] == alone[group] for group in ("weight", "activation", "reconstruction", "corrections"))
    assert cfg.protocol.name == "zeroq"


def test_the_command_line_changes_a_pipeline() -> None:
    cfg = composed(["pipeline=light", "weight=squant", "corrections=none"])
    assert "squant" in cfg.weight._target_
    assert not cfg.corrections
    assert cfg.reconstruction.phases == "none"


@pytest.mark.parametrize("protocol", options("protocol"))
def test_every_protocol_runs_with_its_own_widths_at_the_ends(protocol: str, tmp_path: Path) -> None:
    cfg = composed([*NOISE, f"protocol={protocol}", "reconstruction=none", "bits=w3a3"], tmp_path)
    run_job(cfg)
    weights = [int(row["bits"]) for row in quantizers(tmp_path) if row["kind"] == "weight"]
    stated = (cfg.protocol.first_weight or 3, cfg.protocol.last_weight or 3)
    assert (weights[0], weights[-1]) == stated
    assert set(weights[1:-1]) == {3}
    assert [row for row in quantizers(tmp_path) if row["kind"] == "activation"]


def test_scales_are_powers_of_two_where_a_protocol_says_so(tmp_path: Path) -> None:
    asked = ["protocol=onnxruntime", "protocol.power_of_two=true", "weight=nearest", "activation=fixed"]
    run_job(composed([*NOISE, *asked, "reconstruction=none"], tmp_path))
    scales = [value for key, value in student(tmp_path).items() if key.endswith("scale")]
    assert scales
    assert all(torch.equal(scale.log2(), scale.log2().round()) for scale in scales)


def test_debugging_runs_every_stage(tmp_path: Path) -> None:
    cfg = composed([*SMALL, "debug=default"], tmp_path)
    assert cfg.trainer.detect_anomaly
    assert not cfg.logger
    run_job(cfg)
    stages = json.loads((tmp_path / "record.json").read_text())["stages"]
    assert set(stages) == {"teacher", "convert", "images", "ranges", "reconstruct", "evaluation"}


def test_debugging_goes_without_images(tmp_path: Path) -> None:
    """The preset states a number of images, whatever their source is."""
    quick = [setting for setting in SMALL if not setting.startswith("calibration.")]
    run_job(composed([*quick, "debug=default", "calibration=none", "reconstruction=none", "weight=squant"], tmp_path))
    assert json.loads((tmp_path / "record.json").read_text())["images"]["count"] == 0


def values_of(text: str) -> list[str]:
    """What a sweep gives to a key: all of a list or range, both ends of an interval."""
    override = OverridesParser.create().parse_override(text)
    if override.is_interval_sweep():
        interval = override.value()
        return [str(interval.start), str(interval.end)]
    return list(override.sweep_string_iterator())


@pytest.mark.parametrize("sweep", options("sweep"))
def test_every_job_of_a_sweep_composes(sweep: str) -> None:
    text = (CONF / "sweep" / f"{sweep}.yaml").read_text()
    command = next(line for line in text.splitlines() if " -- " in line or "run.py" in line)
    assert f"sweep={sweep}" in command.split()
    fixed = [word for word in command.split() if word.startswith("experiment=")]
    for key, values in OmegaConf.create(text).hydra.sweeper.params.items():
        for value in values_of(f"{key}={values}"):
            cfg = composed([*fixed, f"{key}={value}"])
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_runs_on_a_tiny_network(experiment: str, tmp_path: Path) -> None:
    chosen = composed([f"experiment={experiment}"])
    small = [
        setting for setting in SMALL if setting.split("=")[0] != "calibration.count" or "count" in chosen.calibration
    ]
    if chosen.distillation.epochs:
        small += ["distillation.epochs=2", "distillation.warmup=1", "distillation.steps=2"]
    cfg = composed([f"experiment={experiment}", *small, "model.checkpoint=null"], tmp_path)
    assert "test/quantized/top1" in run_job(cfg)


@pytest.mark.parametrize("generator", options("generator"))
def test_every_generator_runs(generator: str, tmp_path: Path) -> None:
    run_job(composed([*SMALL, f"generator={generator}", "calibration.count=20", "reconstruction=none"], tmp_path))


# In closed form nothing is learned, so one activation shows what all would. Weights do not know of activations: each
# option meets two of the other kind here, one that learns and one that does not, and all others in the slow tests.
CROSS = ({"nearest", "adaround"}, {"fixed", "lsq"})
PAIRS = [
    pytest.param(w, a, marks=() if w in CROSS[0] or a in CROSS[1] else pytest.mark.slow)
    for w in options("weight")
    for a in options("activation")
    if a == "fixed" or len(choosing(w)) == 1
]


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_every_quantizer_runs(weight: str, activation: str, tmp_path: Path) -> None:
    chosen = [*choosing(weight), f"activation={activation}", "calibration=noise"]
    metrics = run_job(composed([*SMALL, *chosen], tmp_path))
    assert 0 <= metrics["test/quantized/top1"] <= 100


@pytest.mark.parametrize("weight", [option for option in options("weight") if option != "squant"])  # flips at once
def test_nearest_is_rounded_to_nearest_whatever_is_learned(weight: str, tmp_path: Path) -> None:
    searched = OmegaConf.load(CONF / "weight" / f"{weight}.yaml")["range"]
    same_range = ["weight.range._target_=quantizers.ranges.MinMax"]
    same_range += [f"~weight.range.{key}" for key in searched if key != "_target_"]
    small = [*SMALL, "calibration=noise", "bits=w2a4"]
    learned = run_job(composed([*small, *choosing(weight), *same_range], tmp_path))
    plain = run_job(composed([*small, "weight=nearest_minmax", "reconstruction=none"], tmp_path))
    assert learned["test/nearest/kl"] == plain["test/quantized/kl"] == plain["test/nearest/kl"]
