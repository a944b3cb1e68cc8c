"""The main job from configuration to record: what it leaves, what it never touches, and how it goes on when killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
import wandb
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.utilities import rank_zero_only
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deployment.student_file import save_student
from lightning_modules.job import Job
from quantizers.hessian import ClosedForm
from run import run_job
from tests.configuration import CONF, SMALL, composed, options
from tests.killing import Kill, killing


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def choose(weight: str) -> list[str]:
    """Overrides that choose a rounding, and the reconstruction that it needs where it is solved in closed form."""
    solved = issubclass(get_class(OmegaConf.load(CONF / "weight" / f"{weight}.yaml")["_target_"]), ClosedForm)
    return [f"weight={weight}", *(["reconstruction=closed_form"] if solved else [])]


def test_leaves_record_student_images_and_tables(tmp_path: Path) -> None:
    metrics = run_job(composed(SMALL, tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "finished"
    assert facts["metrics"] == metrics
    assert set(facts["stages"]) == {"teacher", "convert", "images", "ranges", "reconstruct", "evaluation"}
    assert facts["row"]["protocol"] == "brecq"
    assert len(facts["teacher"]["weights_hash"]) == 16
    for name in ("images.png", "student.safetensors", "quantizers.csv", "units.csv"):
        assert (tmp_path / name).stat().st_size > 0
    assert not list(tmp_path.glob("**/*.tmp"))


def test_data_free_run_opens_real_images_only_to_be_scored(tmp_path: Path) -> None:
    run_job(composed(SMALL, tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["data_free"] is True
    assert [entry["stage"] for entry in facts["real_data"]] == ["evaluation"]
    assert facts["images"]["origin"] == "synthetic"


def test_real_images_are_listed(tmp_path: Path) -> None:
    run_job(composed([*SMALL, "calibration=real"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["data_free"] is False
    assert [entry["stage"] for entry in facts["real_data"]] == ["evaluation", "calibration"]
    assert list(facts["stages"])[:3] == ["teacher", "convert", "float"]  # measured before any work is done
    assert len(facts["images"]["files"]) == 8


def test_roundings_in_closed_form(tmp_path: Path) -> None:
    metrics = run_job(composed([*SMALL, *choose("gptq"), "activation=fixed"], tmp_path))
    rows = list(csv.DictReader((tmp_path / "units.csv").read_text().splitlines()))
    assert rows
    assert all(row["phase"] == "closed_form" for row in rows)
    assert sum(float(row["error_hard"]) for row in rows) < sum(float(row["error_nearest"]) for row in rows)
    assert {"test/float/top1", "test/nearest/top1", "test/quantized/top1"} <= set(metrics)


def test_roundings_to_be_solved_name_the_reconstruction_they_need(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="add reconstruction=closed_form"):
        run_job(composed([*SMALL, "weight=gptq"], tmp_path))


NO_IMAGES = [option for option in SMALL if not option.startswith("calibration.count")]


@pytest.mark.parametrize("calibration", ["none", "none_aciq"])
def test_without_any_image_ranges_come_from_moments(tmp_path: Path, calibration: str) -> None:
    run_job(composed([*NO_IMAGES, f"calibration={calibration}", "reconstruction=none"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["data_free"] is True
    assert [entry["stage"] for entry in facts["real_data"]] == ["evaluation"]
    assert (facts["row"]["images"], facts["row"]["image_count"]) == ("none", 0)
    scales = [value for key, value in student(tmp_path).items() if "activation_sites" in key and key.endswith("scale")]
    assert scales
    assert all(float(scale) > 0 and float(scale) != 1 for scale in scales)


def test_nothing_can_be_reconstructed_without_images(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"reconstruction: expected none with calibration=none.*add reconstruction=none"
    ):
        run_job(composed([*NO_IMAGES, "calibration=none"], tmp_path))
    assert not (tmp_path / "student.safetensors").exists()


@pytest.mark.parametrize("calibration", ["noise", "real"])
def test_float_answers_from_the_store_give_the_same_bits(tmp_path: Path, calibration: str) -> None:
    results = []
    for name in ("measured", "known"):
        cfg = composed([*SMALL, f"calibration={calibration}"], tmp_path / name)
        cfg.paths.store = str(tmp_path / "store")
        results.append((run_job(cfg), json.loads((tmp_path / name / "record.json").read_text())))
    assert results[0][0] == results[1][0]
    assert [facts["float_from_store"] for _, facts in results] == [False, True]
    opened = [sorted(facts["real_data"], key=lambda entry: entry["stage"]) for _, facts in results]
    assert opened[0] == opened[1]  # in another order with real images: known, the accuracy is not measured first
    assert same(student(tmp_path / "measured"), student(tmp_path / "known"))


class Made(Exception):  # noqa: N818  not an error
    pass


def test_a_float_accuracy_that_is_not_the_stated_one_is_flagged_before_images_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise Made

    monkeypatch.setattr("run.calibration_images", stop)
    whole = [option for option in SMALL if not option.startswith("data.limit")]
    found = []
    for name in ("noise", "real", "noise"):  # nothing known; measured now; known
        folder = tmp_path / str(len(found))
        cfg = composed([*whole, f"calibration={name}", "model.stated_top1=99.0"], folder)
        cfg.paths.store = str(tmp_path / "store")
        with pytest.raises(Made):
            run_job(cfg)
        found.append(json.loads((folder / "record.json").read_text()))
    assert [len(facts["real_data"]) for facts in found] == [0, 1, 0]
    assert "warning" not in found[0]
    assert all("the model configuration states 99.00" in facts["warning"] for facts in found[1:])


def test_targets_are_measured_once_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*SMALL, "generator=dsg", "generator.slack.images=8"]
    first, again = tmp_path / "first", tmp_path / "again"
    run_job(composed(overrides, first))
    assert (first / "targets.png").stat().st_size > 0
    monkeypatch.setattr("synthesis.targets.Slack.targets", lambda *arguments: pytest.fail("measured again"))
    cfg = composed([*overrides, "generator.steps=3"], again)  # other images, the same targets
    with open_dict(cfg):
        cfg.paths.store = str(first / "store")
    run_job(cfg)


def test_only_the_main_process_draws_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    overrides = [*SMALL, "generator=dsg", "generator.slack.images=8", "reconstruction=none"]
    assert run_job(composed(overrides, tmp_path)) == {}
    assert not list(tmp_path.glob("*.png"))


def test_images_are_synthesised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[str] = []
    fit = Job.fit

    def counting(self: Job, module: Any, *args: Any) -> None:
        fitted.append(module.stage)
        fit(self, module, *args)

    monkeypatch.setattr(Job, "fit", counting)
    for bits in ("w4a4", "w3a3"):
        run_job(composed([*SMALL, f"bits={bits}", f"+paths.unused={bits}"], tmp_path))
    assert fitted == ["synthesis", "reconstruction", "reconstruction"]


def test_a_shared_reconstruction_gives_the_same_student_and_is_done_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SMALL, "weight=adaquant", "reconstruction=adaquant_parallel", "reconstruction.batch_size=4"]
    run_job(composed(overrides, tmp_path / "alone"))
    fitted: list[str] = []
    fit = Job.fit
    monkeypatch.setattr(Job, "fit", lambda *arguments: (fitted.append(arguments[1].stage), fit(*arguments)))
    for name in ("shared", "again"):
        cfg = composed([*overrides, "share_reconstruction=2"], tmp_path / name)
        with open_dict(cfg):
            cfg.paths.store = str(tmp_path / "alone" / "store")
        run_job(cfg)
        assert same(student(tmp_path / name), student(tmp_path / "alone"))
    assert fitted == ["reconstruction_0", "reconstruction_1"]


def test_observers_change_no_number(tmp_path: Path) -> None:
    watched, alone = tmp_path / "watched", tmp_path / "alone"
    for folder, extra in ((watched, ["logger=csv"]), (alone, ["callbacks=none"])):
        cfg = composed([*SMALL, *extra], folder)
        if extra == ["logger=csv"]:
            cfg.callbacks.checkpoint.every_seconds = 0
        run_job(cfg)
    assert same(student(watched), student(alone))
    assert (watched / "csv" / "metrics.csv").exists()


@pytest.mark.parametrize(("stage", "step"), [("synthesis", 3), ("reconstruction", 1), ("reconstruction", 7)])
@pytest.mark.parametrize("reconstruction", ["qdrop", "brecq"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, stage: str, step: int, reconstruction: str) -> None:
    overrides = [
        *SMALL,
        f"reconstruction={reconstruction}",
        "reconstruction.iterations=4",
        "generator=zeroq",
        "generator.batch_size=4",
        "callbacks.checkpoint.every_seconds=0",
        killing(stage, step),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_job(composed(overrides, whole))
    cfg = composed(overrides, killed)
    Kill.armed = True
    with pytest.raises(InterruptedError):
        run_job(cfg)
    assert json.loads((killed / "record.json").read_text())["status"] == "failed"
    assert (killed / "checkpoints" / f"{stage}.ckpt").exists()
    cfg.resume = str(killed)
    run_job(cfg)
    assert same(student(whole), student(killed))
    assert json.loads((killed / "record.json").read_text())["row"]["images_from_store"] is False
    assert not list((killed / "checkpoints").iterdir())


class Steps(pl.Callback):
    """Counts the steps of each stage."""

    taken: ClassVar[dict[str, int]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        Steps.taken[pl_module.stage] = Steps.taken.get(pl_module.stage, 0) + 1


SHORT = [
    *SMALL,
    "generator=zeroq",
    "reconstruction.iterations=1",
    "callbacks.checkpoint.every_seconds=0",
    f"+callbacks.steps={{_target_: {__name__}.Steps}}",
]


def kill(*arguments: Any) -> None:
    """In place of what saves a result; targets, which come before any image, are only not stored."""
    if not any(isinstance(argument, dict) and "targets" in argument for argument in arguments):
        raise KeyboardInterrupt


def test_trained_images_outlive_a_kill_before_they_are_stored_and_a_store_that_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*SHORT, "reconstruction=none"]
    digests = []
    for name, place in (("put", "synthesis.store.SampleStore.put"), ("full", "run.save_student"), ("whole", None)):
        folder = tmp_path / name
        cfg = composed(overrides, folder)
        if name == "full":
            (folder / "store").touch()  # a file where the folder should be
        if place is not None:
            with monkeypatch.context() as patch:
                patch.setattr(place, kill)
                with pytest.raises(KeyboardInterrupt):
                    run_job(cfg)
            cfg.resume = str(folder)
        Steps.taken = {}
        run_job(cfg)
        assert Steps.taken == ({} if place else {"synthesis": 2})
        assert not list((folder / "checkpoints").iterdir())
        digests.append(json.loads((folder / "record.json").read_text())["images"]["digest"])
    assert len(set(digests)) == 1


def test_a_reconstruction_outlives_a_kill_before_the_student_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, before = composed(SHORT, tmp_path), tmp_path / "before.safetensors"

    def save_elsewhere(student: torch.nn.Module, path: Path, identity: dict[str, str]) -> None:
        save_student(student, before, identity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("run.save_student", save_elsewhere)
        with pytest.raises(KeyboardInterrupt):
            run_job(cfg)
    cfg.resume = str(tmp_path)
    Steps.taken = {}
    run_job(cfg)
    assert Steps.taken == {}
    assert not list((tmp_path / "checkpoints").iterdir())
    assert same(load_file(before), student(tmp_path))


def test_shared_synthesis_makes_the_same_images_and_goes_on_when_killed(tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        "generator=zeroq",
        "generator.batch_size=4",
        "reconstruction=none",
        "callbacks.checkpoint.every_seconds=0",
        killing("synthesis_1", 1),
    ]
    run_job(composed(overrides, tmp_path / "alone"))
    cfg = composed([*overrides, "share_synthesis=true"], tmp_path / "shared")
    Kill.armed = True
    with pytest.raises(InterruptedError):
        run_job(cfg)
    assert (tmp_path / "shared" / "checkpoints" / "synthesis_1.ckpt").exists()
    cfg.resume = str(tmp_path / "shared")
    run_job(cfg)
    records = [json.loads((tmp_path / name / "record.json").read_text()) for name in ("alone", "shared")]
    assert records[0]["images"]["digest"] == records[1]["images"]["digest"]
    assert records[0]["config_hash"] == records[1]["config_hash"]


def test_saved_student_is_scored_without_calibrating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = composed(SMALL, tmp_path)
    first = run_job(cfg)
    monkeypatch.setattr(Job, "fit", None)
    before = (tmp_path / "record.json").read_bytes()
    scored = composed([*SMALL, f"evaluate={tmp_path}"], tmp_path / "scored")
    again = run_job(scored)
    assert again == {key: value for key, value in first.items() if "nearest" not in key}
    assert (tmp_path / "record.json").read_bytes() == before  # the finished run stays as it was
    images = [json.loads((folder / "record.json").read_text())["images"] for folder in (tmp_path, tmp_path / "scored")]
    assert images[0] == images[1]
    captions = " ".join(capsys.readouterr().out.split())
    assert captions.count("8 synthetic calibration images") == 2


def test_a_run_that_only_went_on_with_another_is_not_taken_for_it(tmp_path: Path) -> None:
    run_job(composed(SMALL, tmp_path / "first"))
    run_job(composed([*SMALL, f"evaluate={tmp_path / 'first'}"], tmp_path / "second"))
    third = composed([*SMALL, f"evaluate={tmp_path / 'second'}"], tmp_path / "third")
    with pytest.raises(ValueError, match=r"name that one: evaluate=.*first"):
        run_job(third)


def test_a_resumed_run_keeps_its_own_labels(tmp_path: Path) -> None:
    cfg = composed(SMALL, tmp_path)
    run_job(cfg)
    record = tmp_path / "record.json"
    facts = json.loads(record.read_text()) | {"choices": {"reconstruction": "brecq"}, "overrides": ["bits=w3a3"]}
    record.write_text(json.dumps(facts))
    run_job(composed([*SMALL, f"resume={tmp_path}"], tmp_path / "new"))
    again = json.loads(record.read_text())
    assert again["row"]["pipeline"] == "brecq"
    assert again["overrides"] == ["bits=w3a3"]
    assert again["row"]["seconds"] > facts["row"]["seconds"]
    assert "reconstruct" not in again["stages"]  # the student was there already
    assert again["metrics"] == facts["metrics"]


def test_settings_that_change_no_number_do_not_change_the_hash(tmp_path: Path) -> None:
    hashes = []
    for name, extra in (("a", "logger=none"), ("b", "logger=csv"), ("c", "seed=1")):
        run_job(composed([*SMALL, "calibration=noise", "reconstruction=none", extra], tmp_path / name))
        hashes.append(json.loads((tmp_path / name / "record.json").read_text())["config_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_where_the_files_lie_does_not_change_the_hash(tmp_path: Path) -> None:
    hashes = []
    for place in ("a", "b"):  # a configuration with places in its options: the checkpoint, the folder of the images
        cfg = composed(["model=cifar10_resnet20", "data=cifar10", "calibration=real"], tmp_path / place)
        cfg.paths.data = str(tmp_path / place / "data")
        with pytest.raises(Exception, match=r"cifar10_resnet20\.pth"):
            run_job(cfg)
        hashes.append(json.loads((tmp_path / place / "record.json").read_text())["config_hash"])
    assert hashes[0] == hashes[1]


def test_missing_data_is_said_before_any_work(tmp_path: Path) -> None:
    cfg = composed([*SMALL, "data=cifar10", "~data.limit", "+data.limit=8"], tmp_path)
    with pytest.raises(ValueError, match="choose data that fits the model"):
        run_job(cfg)
    assert "images" not in json.loads((tmp_path / "record.json").read_text())["stages"]


def test_a_failed_job_still_finishes_wandb(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("logger")]
    offline = ["logger=wandb", "logger.wandb.offline=true"]
    cfg = composed([*small, *offline, "bits.weight=1"], tmp_path)
    with pytest.raises(Exception, match=r"bits\.weight"):
        run_job(cfg)
    assert wandb.run is None
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_tensorboard_carries_the_metrics(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("logger")]
    metrics = run_job(composed([*small, "logger=tensorboard", "calibration=noise"], tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("test/quantized/top1")
    assert event.value == pytest.approx(metrics["test/quantized/top1"])


@pytest.mark.parametrize("weight", [option for option in options("weight") if option != "squant"])  # flips at once
def test_nearest_is_rounded_to_nearest_whatever_is_learned(weight: str, tmp_path: Path) -> None:
    searched = OmegaConf.load(CONF / "weight" / f"{weight}.yaml")["range"]
    same_range = ["weight.range._target_=quantizers.ranges.MinMax"]
    same_range += [f"~weight.range.{key}" for key in searched if key != "_target_"]
    small = [*SMALL, "calibration=noise", "bits=w2a4"]
    learned = run_job(composed([*small, *choose(weight), *same_range], tmp_path))
    plain = run_job(composed([*small, "weight=nearest_minmax", "reconstruction=none"], tmp_path))
    assert learned["test/nearest/kl"] == plain["test/quantized/kl"] == plain["test/nearest/kl"]


def test_a_failing_job_says_why(tmp_path: Path) -> None:
    cfg = composed([*SMALL, "bits.weight=1"], tmp_path)
    with pytest.raises(Exception, match=r"bits\.weight.*got 1"):
        run_job(cfg)
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "failed"
    assert "bits.weight" in facts["error"]


def test_a_job_that_cannot_even_open_says_so_in_its_record(tmp_path: Path) -> None:
    small = [option for option in SMALL if not option.startswith("calibration")]
    with pytest.raises(Exception, match=r"calibration\.count"):
        run_job(composed([*small, "calibration.count=0"], tmp_path))
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["status"] == "failed"
    assert "calibration.count" in facts["error"]


def test_the_row_says_whether_another_run_made_the_images(tmp_path: Path) -> None:
    rows = []
    for name, extra in (("a", []), ("b", ["bits=w3a3"]), ("c", ["calibration=noise"]), ("d", ["generator=noise"])):
        cfg = composed([*SMALL, *extra, "reconstruction=none"], tmp_path / name)
        cfg.paths.store = str(tmp_path / "store")
        run_job(cfg)
        rows.append(json.loads((tmp_path / name / "record.json").read_text())["row"])
    assert [row["images_from_store"] for row in rows] == [False, True, False, False]
    assert [row["generator_steps"] for row in rows] == [2, 2, None, 0]


def test_resume_needs_a_run(tmp_path: Path) -> None:
    cfg = composed([*SMALL, f"resume={tmp_path / 'nothing'}"], tmp_path / "x")
    with pytest.raises(ValueError, match="expected the folder of an earlier run"):
        run_job(cfg)


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


# In closed form nothing is learned, so one activation shows what all would.
PAIRS = [(w, a) for w in options("weight") for a in options("activation") if a == "fixed" or len(choose(w)) == 1]


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_every_quantizer_runs(weight: str, activation: str, tmp_path: Path) -> None:
    chosen = [*choose(weight), f"activation={activation}", "calibration=noise"]
    metrics = run_job(composed([*SMALL, *chosen], tmp_path))
    assert 0 <= metrics["test/quantized/top1"] <= 100


def test_configuration_is_in_the_record(tmp_path: Path) -> None:
    cfg: DictConfig = composed(SMALL, tmp_path)
    run_job(cfg)
    facts = json.loads((tmp_path / "record.json").read_text())
    assert facts["config"] == OmegaConf.to_container(cfg, resolve=True)
