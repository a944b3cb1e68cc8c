"""Signals: the step in work is finished and saved, then the run exits or is requeued, and goes on bitwise."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from lightning_modules.interruption import RESTARTED, Interrupted, Interruption
from lightning_modules.job import Job
from lightning_modules.processes import end_with_parent, limit_threads
from run import run_job
from tests.callbacks.offline_runs import read_runs
from tests.configuration import SMALL, composed
from tests.saved_students import same, student

SHORT = (
    *SMALL,
    "reconstruction.iterations=4",
    "generator=zeroq",
    "generator.batch_size=4",
    "callbacks.checkpoint.every_seconds=1000",
)


class Send(pl.Callback):
    """Sends this process a signal as a step begins, in runs whose folder is named `stopped`, before it is requeued."""

    def __init__(self, signum: int, stage: str, step: int, folder: str) -> None:
        self.signum, self.stage, self.step, self.armed = signum, stage, step, Path(folder).name == "stopped"

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        here = pl_module.stage == self.stage and trainer.global_step == self.step
        if self.armed and here and RESTARTED not in os.environ:
            os.kill(os.getpid(), self.signum)


def sending(signum: int, stage: str, step: int) -> list[str]:
    target = f"_target_: {__name__}.Send, signum: {signum}, stage: {stage}, step: {step}"
    return [*SHORT, f"+callbacks.send={{{target}, folder: '${{paths.output}}'}}"]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())


def test_only_the_first_process_keeps_the_csv_of_an_interrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = composed([*SMALL, "calibration=noise"], tmp_path)
    cfg.resume = str(tmp_path)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("of the first process, which logs already")
    for rank, found in ((1, ["metrics.csv"]), (0, ["metrics_part1.csv"])):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        Job(cfg, tmp_path).open()
        assert [path.name for path in (tmp_path / "csv").iterdir()] == found


@pytest.mark.parametrize(
    ("signum", "stage", "step"), [(signal.SIGTERM, "reconstruction", 6), (signal.SIGUSR2, "synthesis", 2)]
)
def test_a_stopped_run_saves_its_step_and_goes_on_to_the_same_student(
    tmp_path: Path, signum: int, stage: str, step: int
) -> None:
    overrides, stopped = sending(signum, stage, step), tmp_path / "stopped"
    whole = run_job(composed(overrides, tmp_path / "whole"))
    cfg = composed(overrides, stopped)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR2)]
    with pytest.raises(Interrupted) as stop:
        run_job(cfg)
    assert stop.value.code == 128 + signum
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR2)] == handlers
    assert record(stopped)["status"] == "interrupted"
    assert torch.load(stopped / "checkpoints" / f"{stage}.ckpt", weights_only=True)["global_step"] == step + 1
    cfg.resume, cfg.callbacks.send.step = str(stopped), 1000
    assert run_job(cfg) == whole
    assert same(student(stopped), student(tmp_path / "whole"))


def test_a_requeued_job_is_handed_over_when_all_is_saved_and_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, stopped = sending(signal.SIGUSR2, "reconstruction", 6), tmp_path / "stopped"
    whole = run_job(composed(overrides, tmp_path / "whole"))
    seen: list[str] = []

    def requeue(signum: int, frame: Any) -> None:  # as submitit's
        assert (stopped / "checkpoints" / "reconstruction.ckpt").exists()
        seen.append(record(stopped)["status"])
        raise SystemExit(-1)

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        cfg = composed(overrides, stopped)
        with pytest.raises(SystemExit, match="-1"):
            run_job(cfg)
        assert seen == ["interrupted"]
        monkeypatch.setenv(RESTARTED, "1")
        assert run_job(composed(overrides, stopped)) == whole
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert same(student(stopped), student(tmp_path / "whole"))
    assert record(stopped)["status"] == "finished"
    assert [list(stages)[-1] for stages in record(stopped)["earlier_stages"]] == ["reconstruct"]


def test_an_announced_end_is_saved_but_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    saved: list[int] = []
    save = "callbacks.checkpoint.StageCheckpoint.save"
    monkeypatch.setattr(save, lambda self, trainer, module: saved.append(trainer.global_step))
    run_job(composed(sending(signal.SIGTERM, "reconstruction", 3), tmp_path / "stopped"))
    assert saved == [4]
    assert record(tmp_path / "stopped")["status"] == "finished"


def test_a_restarted_job_of_another_configuration_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_job(composed([*SMALL, "calibration=noise"], tmp_path))
    run_job(composed([*SMALL, "calibration=noise"], tmp_path))
    assert "reconstruct" not in record(tmp_path)["stages"]
    run_job(composed([*SMALL, "calibration=noise", "bits=w3a3"], tmp_path))
    assert "reconstruct" in record(tmp_path)["stages"]
    assert "earlier_stages" not in record(tmp_path)


def test_outside_of_training_a_run_stops_at_once_but_not_while_it_is_closed() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), Interruption():
        os.kill(os.getpid(), signal.SIGTERM)
    with Interruption() as interruption:
        interruption.closing = True
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.signum == signal.SIGTERM


def test_the_wandb_run_is_the_same_after_a_restart(tmp_path: Path) -> None:
    small = [argument for argument in SMALL if not argument.startswith("logger")]
    overrides = [*small, "logger=wandb", "logger.wandb.offline=true", "calibration=noise"]
    cfg = composed(overrides, tmp_path)
    run_job(cfg)
    cfg.resume = str(tmp_path)
    time.sleep(1)  # folders of wandb's are named by the second
    run_job(cfg)
    files = [path.stem for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    known = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert files == [f"run-{known}"] * 2  # neither wrote over the other
    assert {run.id for run in read_runs(tmp_path)} == {known}


def test_threads_are_those_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        limit_threads(composed(["trainer.threads=2"]))
        assert torch.get_num_threads() == 2
        limit_threads(composed())
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match=r"trainer\.threads: expected null or at least 1, got 0"):
            limit_threads(composed(["trainer.threads=0"]))
    finally:
        torch.set_num_threads(before)


def test_a_process_whose_parent_is_gone_is_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: asked.append(signum))
    try:
        monkeypatch.setenv("CALIBRANT_PARENT", "1" if os.getppid() != 1 else "2")
        end_with_parent(1)
        for _ in range(100):
            if asked:
                break
            signal.sigtimedwait([], 0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGTERM]
