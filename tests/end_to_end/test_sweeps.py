"""Sweeps on the command line: failures, reports, kills and resumption, and work that jobs share."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from synthesis.store import SampleStore
from tests.configuration import ROOT, SMALL

SWEPT = ("bits=w4a4,w2a4", "seed=0,1", "callbacks.checkpoint.every_seconds=0")
VARYING = ("seconds", "peak_mib", "date", "images_from_store", "commit")  # of two equal sweeps
FINISHED = 4
MET = 6  # of twenty kills at random moments, those that meet a job in work at the least


def command(*arguments: str) -> list[str]:
    flags = [argument for argument in arguments if argument == "-m"]
    return [sys.executable, str(ROOT / "run.py"), *flags, *SMALL, *(a for a in arguments if a != "-m")]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "CALIBRANT_STORE": str(folder / "store"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "PYTHONPATH": str(ROOT),
    }


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )


def kill(folder: Path, due: Callable[[], bool], *arguments: str) -> bool:
    """Start a run and kill it as soon as `due` says so; False if it ended before."""
    process = subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not due():
        time.sleep(0.005)
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not ended


def table(sweep: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((sweep / "sweep.csv").read_text().splitlines()))
    return [{key: value for key, value in row.items() if key not in VARYING} for row in rows]


def records(sweep: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sweep.glob("*/record.json")}


def expect_clean(folder: Path) -> None:
    """No lock, no file that was never finished, every json whole."""
    left = [p for p in folder.rglob("*") if p.suffix in (".lock", ".tmp", ".ckpt") or p.name.startswith(".tmp")]
    assert not left
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    begun = time.monotonic()
    done = call(folder, "-m", *SWEPT)
    assert done.returncode == 0, done.stderr
    (folder / "seconds").write_text(str(time.monotonic() - begun))
    (sweep,) = (folder / "multirun").iterdir()
    return sweep


def test_a_sweep_leaves_its_report_and_synthesises_once_a_seed(undisturbed: Path) -> None:
    rows = list(csv.DictReader((undisturbed / "sweep.csv").read_text().splitlines()))
    assert [(row["w_bits"], row["seed"], row["status"]) for row in rows] == [
        (bits, seed, "finished") for bits in "42" for seed in "01"
    ]
    assert [row["images_from_store"] for row in rows] == ["False", "False", "True", "True"]
    for name in ("sweep.md", "report.html", "pareto.png", "heat_map.png"):
        assert (undisturbed / name).stat().st_size > 0
    expect_clean(undisturbed.parent.parent)


def test_killed_twice_and_resumed_is_the_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    sweeps = tmp_path / "multirun"
    in_reconstruction = "*/w*/checkpoints/reconstruction.ckpt"
    assert kill(tmp_path, lambda: any(sweeps.glob(in_reconstruction)), "-m", *SWEPT)
    (sweep,) = sweeps.iterdir()
    assert not any(record["status"] == "finished" for record in records(sweep).values())
    resumed = [*reversed(SWEPT), "-m", "sweep.resume=true"]  # in another order
    assert kill(tmp_path, lambda: len(records(sweep)) == 2, *resumed)
    done = call(tmp_path, *resumed)
    assert done.returncode == 0, done.stderr
    assert list(sweeps.iterdir()) == [sweep]
    assert "resuming from" in "".join(path.read_text() for path in sweep.glob("*/run.log"))
    by_folder = {row["folder"]: row for row in table(undisturbed)}
    assert {row["folder"]: row for row in table(sweep)} == by_folder
    expect_clean(tmp_path)


def test_only_what_is_not_finished_runs_and_what_fails_is_reported_with_exit_code_one(undisturbed: Path) -> None:
    before = {name: record["started"] for name, record in records(undisturbed).items()}
    other = ["bits=w4a4", "seed=0", "weight=gptq,adaround,nearest", SWEPT[-1]]  # GPTQ is refused by this reconstruction
    done = call(undisturbed.parent.parent, "-m", *other, "sweep.resume=true", f"hydra.sweep.dir={undisturbed}")
    assert done.returncode == 1
    assert "1 of 3 jobs are finished, 2 to run" in done.stdout  # that with weight=adaround, which is the default
    after = records(undisturbed)
    assert {name: after[name]["started"] for name in before} == before
    assert [record["status"] for name, record in after.items() if "gptq" in name] == ["failed"]
    assert [record["status"] for name, record in after.items() if "nearest" in name] == ["finished"]
    assert len(after) == FINISHED + 2
    assert "1 of 3 jobs failed" in done.stdout
    assert done.stdout.count("report.html, sweep.csv") == 1  # the report comes, and once
    assert "closed_form" in (undisturbed / "report.html").read_text()


def expect_whole(folder: Path) -> None:
    """Every file that carries its final name can be read to its end."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".tmp":
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = list(csv.reader(file, strict=True))
            assert len({len(row) for row in rows}) == 1, path
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert list(tensors.keys()), path
        elif path.suffix == ".ckpt":
            assert zipfile.ZipFile(path).testzip() is None, path
        elif path.suffix == ".png":
            Image.open(path).load()


def work_left(undisturbed: Path, sweep: Path) -> tuple[float, float]:
    """Seconds of a resumed run before its first job, and of the jobs it has to do, as the undisturbed one took them."""
    took = {name: sum(s["seconds"] for s in facts["stages"].values()) for name, facts in records(undisturbed).items()}
    there = records(sweep)
    done = [name for name in took if there.get(name, {}).get("status") == "finished"]
    start = float((undisturbed.parent.parent / "seconds").read_text()) - sum(took.values())
    return start, sum(seconds for name, seconds in took.items() if name not in done)


def in_work(sweep: Path, begun: float) -> bool:
    """Whether a record says that a job runs and was written since."""
    recent = [path for path in sweep.glob("*/record.json") if path.stat().st_mtime >= begun]
    return any(json.loads(path.read_text())["status"] == "running" for path in recent)


def moment_after(first: Callable[[], bool], seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have gone by since something was first so."""
    since: list[float] = []

    def due() -> bool:
        if not since and first():
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] >= seconds

    return due


@pytest.mark.slow
def test_killed_at_twenty_random_moments_is_the_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    sweep, rng, met = tmp_path / "sweep", random.Random(0), 0
    line = [*SWEPT, "-m", "sweep.resume=true", "hydra.sweep.dir=sweep"]
    for number in range(20):
        start, work = work_left(undisturbed, sweep)
        begun = time.time()
        due = moment_after(lambda begun=begun: in_work(sweep, begun), rng.uniform(0, work))
        if number % 5 == 4:  # while it starts, looks for what is done, or sets aside
            due = moment_after(lambda: True, rng.uniform(0.3, 1.0) * start)
        if kill(tmp_path, due, *line):
            met += in_work(sweep, begun)
        else:
            assert table(sweep) == table(undisturbed)[:FINISHED]
            for record in list(sweep.glob("*/record.json"))[:3]:
                record.unlink()  # so that there is something left to kill
        expect_whole(tmp_path)
    assert met >= MET, f"{met} of 20 kills met a job in work"
    done = call(tmp_path, *line)
    assert done.returncode == 0, done.stderr
    assert table(sweep) == table(undisturbed)[:FINISHED]
    expect_clean(tmp_path)
    expect_whole(tmp_path)


def test_jobs_that_start_at_the_same_moment_make_the_images_once(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            command(f"bits={bits}", f"hydra.run.dir={bits}", "generator.steps=6"),
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for bits in ("w4a4", "w2a4")
    ]
    assert [process.wait(timeout=200) for process in started] == [0, 0]
    images = [json.loads((tmp_path / bits / "record.json").read_text())["images"] for bits in ("w4a4", "w2a4")]
    assert images[0]["digest"] == images[1]["digest"]
    assert sorted(part["from_store"] for part in images) == [False, True]
    expect_clean(tmp_path)


def test_what_killed_jobs_left_in_the_store_is_removed_and_what_others_hold_is_not(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    dead = (
        "import os, sys; from pathlib import Path; from synthesis.leases import Lease; "
        "lease = Lease(Path(sys.argv[1]), 600); lease.acquire(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", dead, str(tmp_path / "a.lock")], cwd=ROOT, check=False, timeout=60)
    (tmp_path / ".a.123.tmp").write_bytes(b"half")
    assert (tmp_path / "a.lock").exists()
    held = store._lease({"of": "another"})
    assert held.acquire()
    store.forget_dead()
    assert [path.name for path in tmp_path.iterdir()] == [store.path({"of": "another"}).with_suffix(".lock").name]
    held.release()
