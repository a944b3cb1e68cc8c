"""The store: keyed by meaning, whole files only, damage noticed, concurrent jobs make once."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthesis.store import SampleStore

RECIPE = {"teacher": "abc", "generator": {"steps": 500, "lr": 0.5}, "seed": 0}
IMAGES = torch.arange(24.0).view(2, 3, 2, 2)


def test_round_trip_and_key_is_independent_of_order(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "deep")
    assert store.get(RECIPE) is None
    store.put(RECIPE, IMAGES)
    reordered: dict[str, Any] = {"seed": 0, "generator": {"lr": 0.5, "steps": 500}, "teacher": "abc"}
    found = SampleStore(tmp_path / "deep").get(reordered)
    assert found is not None
    assert torch.equal(found, IMAGES)
    assert store.get({**RECIPE, "seed": 1}) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other"])
def test_damaged_file_is_logged_and_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = SampleStore(tmp_path)
    store.put(RECIPE, IMAGES)
    path = store.path(RECIPE)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-8])
    elif damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        other = {**RECIPE, "seed": 1}
        store.put(other, IMAGES)
        store.path(other).replace(path)
    with caplog.at_level(logging.WARNING):
        made = store.get_or_make(RECIPE, lambda: IMAGES + 1)
    assert "will be made again" in caplog.text
    assert torch.equal(made, IMAGES + 1)
    again = store.get(RECIPE)
    assert again is not None
    assert torch.equal(again, IMAGES + 1)


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore(tmp_path)
    store.put(RECIPE, IMAGES)

    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("synthesis.store.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        store.put(RECIPE, IMAGES + 1)
    assert [path.name for path in tmp_path.iterdir()] == [store.path(RECIPE).name]
    assert torch.equal(store.get(RECIPE), IMAGES)  # type: ignore[arg-type]


def test_failed_making_releases_the_lock(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, patience=1)

    def fail() -> Tensor:
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        store.get_or_make(RECIPE, fail)
    assert torch.equal(store.get_or_make(RECIPE, lambda: IMAGES), IMAGES)


def test_threads_make_once(tmp_path: Path) -> None:
    made, found = [], []

    def make() -> Tensor:
        made.append(1)
        time.sleep(0.3)
        return IMAGES

    threads = [
        threading.Thread(target=lambda: found.append(SampleStore(tmp_path).get_or_make(RECIPE, make))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(torch.equal(images, IMAGES) for images in found)


def _job(folder: Path, start: Any) -> None:
    def make() -> Tensor:
        (folder / f"made-{multiprocessing.current_process().pid}").touch()
        time.sleep(0.5)
        return IMAGES

    start.wait()
    SampleStore(folder).get_or_make(RECIPE, make)


@pytest.mark.slow  # two interpreters import torch
def test_processes_make_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    jobs = [context.Process(target=_job, args=(tmp_path, start)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert torch.equal(SampleStore(tmp_path).get(RECIPE), IMAGES)  # type: ignore[arg-type]


def test_waiting_too_long_names_the_lock(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, patience=0.1)
    with store._locked(RECIPE), pytest.raises(TimeoutError, match="delete the lock file"):
        SampleStore(tmp_path, patience=0.1).get_or_make(RECIPE, lambda: IMAGES)


def test_recipe_must_be_plain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe: expected plain JSON"):
        SampleStore(tmp_path).key({"path": tmp_path})
    with pytest.raises(ValueError, match="recipe: expected plain JSON"):
        SampleStore(tmp_path).key({"lr": float("nan")})


def test_unfinished_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: expected finite pixels"):
        SampleStore(tmp_path).put(RECIPE, torch.full((1, 3, 2, 2), float("nan")))
    assert not list(tmp_path.iterdir())


def test_jobs_share_the_parts_and_end_with_one_entry(tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []

    def job(name: str) -> Tensor:
        def make(part: int) -> Tensor:
            made.append((name, part))
            time.sleep(0.3)
            return torch.full((2, 1), float(part))

        return SampleStore(tmp_path).get_or_gather(RECIPE, 4, make)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(job, "ab"))
    expected = torch.tensor([[0.0], [0], [1], [1], [2], [2], [3], [3]])
    assert all(torch.equal(images, expected) for images in found)
    assert sorted(part for _, part in made) == [0, 1, 2, 3]
    assert {name for name, _ in made} == {"a", "b"}
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [SampleStore(tmp_path).path(RECIPE).name]


def test_parts_of_a_killed_job_are_kept_and_damaged_ones_made_again(tmp_path: Path) -> None:
    store, made = SampleStore(tmp_path), []

    def make(part: int) -> Tensor:
        made.append(part)
        if part == 2 and len(made) == 3:
            raise KeyboardInterrupt
        return torch.full((1, 2), float(part))

    with pytest.raises(KeyboardInterrupt):
        store.get_or_gather(RECIPE, 3, make)
    store.path({**RECIPE, "part": 0}).write_bytes(b"damaged")
    assert torch.equal(store.get_or_gather(RECIPE, 3, make), torch.tensor([[0.0, 0], [1, 1], [2, 2]]))
    assert made == [0, 1, 2, 2, 0]


def test_waiting_too_long_for_a_part_names_its_lock(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, patience=0.1)
    part = {**RECIPE, "part": 0}
    with store._locked(part), pytest.raises(TimeoutError, match="delete the lock file"):
        store.get_or_gather(RECIPE, 1, lambda _: IMAGES)
