"""The store: keyed by meaning, whole files only, damage noticed, concurrent jobs make once, nothing made is lost."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
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


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1 KiB: enough for a lock, too little for images; what Linux then says is EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_costs_no_finished_work_and_leaves_no_half_entry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, images = SampleStore(tmp_path), torch.rand(4, 3, 16, 16)
    with pytest.raises((OSError, SafetensorError)):
        store.put(RECIPE, images)
    assert torch.equal(store.get_or_make(RECIPE, lambda: images), images)
    assert f"{tmp_path} cannot be written to" in caplog.text
    assert "choose another folder with paths.store" in caplog.text
    made: list[int] = []

    def make(part: int) -> Tensor:
        made.append(part)
        return images[2 * part : 2 * part + 2]

    assert torch.equal(store.get_or_gather(RECIPE, 2, make), images)
    assert made == [0, 1]
    assert not list(tmp_path.iterdir())


def test_parts_that_fit_are_kept_where_the_whole_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore(tmp_path)

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if len(tensors["images"]) > 1:
            raise SafetensorError("No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr("synthesis.store.save_file", save)
    assert torch.equal(store.get_or_gather(RECIPE, 2, lambda part: IMAGES[part : part + 1]), IMAGES)
    assert store.get(RECIPE) is None
    monkeypatch.undo()
    assert torch.equal(store.get_or_gather(RECIPE, 2, lambda part: pytest.fail("made again")), IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == [store.path(RECIPE).name]


def test_a_folder_that_cannot_be_makes_no_lock_and_costs_no_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    store = SampleStore(tmp_path / "file" / "store")
    assert torch.equal(store.get_or_make(RECIPE, lambda: IMAGES), IMAGES)
    assert torch.equal(store.get_or_gather(RECIPE, 2, lambda part: IMAGES[part : part + 1]), IMAGES)
    assert "no lock" in caplog.text
    assert "cannot be written to" in caplog.text


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
    with store._lease(RECIPE).held(1), pytest.raises(TimeoutError, match="delete the lock file"):
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
    with store._lease(part).held(1), pytest.raises(TimeoutError, match="delete the lock file"):
        store.get_or_gather(RECIPE, 1, lambda _: IMAGES)


def test_a_job_that_is_overtaken_makes_nothing_twice_and_leaves_nothing_behind(tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []

    def make(name: str) -> Callable[[int], Tensor]:
        def one(part: int) -> Tensor:
            made.append((name, part))
            return IMAGES[part : part + 1]

        return one

    class Overtaken(SampleStore):
        """Another job begins and ends when this one has just seen that the whole is missing."""

        begun = False

        def get(self, recipe: Mapping[str, Any]) -> Tensor | None:
            found = super().get(recipe)
            if not self.begun:
                self.begun = True
                SampleStore(tmp_path).get_or_gather(RECIPE, 2, make("other"))
            return found

    assert torch.equal(Overtaken(tmp_path).get_or_gather(RECIPE, 2, make("overtaken")), IMAGES)
    assert made == [("other", 0), ("other", 1)]
    assert [path.name for path in tmp_path.iterdir()] == [SampleStore(tmp_path).path(RECIPE).name]


def test_a_damaged_whole_is_gathered_again(tmp_path: Path) -> None:
    store = SampleStore(tmp_path)
    store.put(RECIPE, IMAGES)
    store.path(RECIPE).write_bytes(b"damaged")
    assert torch.equal(store.get_or_gather(RECIPE, 2, lambda part: IMAGES[part : part + 1] + 1), IMAGES + 1)
    assert [path.name for path in tmp_path.iterdir()] == [store.path(RECIPE).name]


def test_a_part_that_fails_to_be_made_in_time_is_no_part_that_another_job_makes(tmp_path: Path) -> None:
    def make(part: int) -> Tensor:
        raise TimeoutError("a download took too long")

    with pytest.raises(TimeoutError, match="a download took too long"):
        SampleStore(tmp_path, patience=1).get_or_gather(RECIPE, 1, make)
