"""A record run again: bitwise equal, differences found and excused, and refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from omegaconf import DictConfig

from lightning_modules.repeated_runs import DIFFERENT, EQUAL, NOT_COMPARABLE, Repetition, configuration, repeat
from lightning_modules.saved_runs import plain
from run import run_job
from tests.configuration import SMALL, composed

JOB = [*SMALL, "calibration=noise", "reconstruction=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_job(composed(JOB, folder))
    return folder


def altered(folder: Path, tmp_path: Path, **facts: object) -> Path:
    """A copy of the record, alone, with other facts."""
    record = json.loads((folder / "record.json").read_text()) | facts
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    return path


def test_the_same_run_gives_the_same_bits_and_is_the_same_configuration(folder: Path, tmp_path: Path) -> None:
    found = repeat(folder / "record.json", tmp_path / "again", run_job)
    assert found.equal
    assert found.code == EQUAL
    assert found.origins == []
    first, second = (json.loads((place / "record.json").read_text()) for place in (folder, tmp_path / "again"))
    assert first["config_hash"] == second["config_hash"]
    assert not first["images"]["from_store"]
    assert not second["images"]["from_store"]


def test_a_record_alone_is_enough(folder: Path, tmp_path: Path) -> None:
    found = repeat(altered(folder, tmp_path), tmp_path / "again", run_job)
    assert found.equal
    assert (tmp_path / "again" / "student.safetensors").exists()


def test_a_wrong_last_digit_is_found_and_excused_by_another_version_alone(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    metrics = record["metrics"] | {"test/quantized/loss": record["metrics"]["test/quantized/loss"] * (1 + 2**-50)}

    def run(cfg: DictConfig) -> Mapping[str, float]:
        (Path(cfg.paths.output) / "record.json").write_text(json.dumps(record))
        return record["metrics"]

    found = repeat(altered(folder, tmp_path, metrics=metrics), tmp_path / "again", run)
    assert [row["what"] for row in found.metrics if row["a"] != row["b"]] == ["test/quantized/loss"]
    assert found.code == DIFFERENT
    versions = record["versions"] | {"torch": "1.0"}
    found = repeat(altered(folder, tmp_path, metrics=metrics, versions=versions), tmp_path / "other", run)
    assert [row["what"] for row in found.origins] == ["version torch"]
    assert found.code == NOT_COMPARABLE


def test_several_processes_are_started_as_a_command_or_refused_before_anything_starts(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "record.json").read_text())["config"]
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config["hydra"] = {"job_logging": {"handlers": {"own": {"class": "theirs"}}}}
    path, again = altered(folder, tmp_path, config=config), tmp_path / "again"
    with pytest.raises(ValueError, match="expected that of one process, got one of 2"):
        repeat(path, again, run_job)
    assert not again.exists()
    script = tmp_path / "main.py"
    script.write_text(
        "import pathlib, sys\npathlib.Path(sys.argv[2], 'seen').write_text(' '.join(sys.argv))\nexit(3)\n"
    )
    with pytest.raises(ValueError, match="expected the repeated run to finish, got exit code 3"):
        repeat(path, again, run_job, script)
    assert "theirs" not in (again / ".hydra" / "config.yaml").read_text()
    words = (again / ".hydra" / "seen").read_text().split()
    assert words[1:5] == ["--config-path", str(again / ".hydra"), "--config-name", "config"]


def test_no_metric_is_no_agreement(tmp_path: Path) -> None:
    assert Repetition([], [], tmp_path).code == DIFFERENT


def test_paths_of_a_record_alone_follow_the_new_folder(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "record.json").read_text())
    cfg = configuration(record, tmp_path, tmp_path / "new")
    assert str(folder) not in json.dumps(plain(cfg))
    assert cfg.callbacks.checkpoint.folder == f"{tmp_path / 'new'}/checkpoints"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"status": "running"}, "expected that of a finished run"),
        ({"config": {"evaluate": "x"}}, "only scored another"),
    ],
)
def test_what_cannot_be_repeated_is_refused(folder: Path, tmp_path: Path, facts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repeat(altered(folder, tmp_path, **facts), tmp_path / "again", run_job)


def test_a_folder_with_a_run_is_not_written_over(folder: Path) -> None:
    with pytest.raises(ValueError, match="output: expected a folder without a run"):
        repeat(folder, folder, run_job)
