"""The run's record: complete after each stage, also when the run fails."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.run_record import RunRecord, digest, forget_peak, machine


def test_seconds_and_memory_of_each_stage(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {"seed": 0})
    with record.stage("images"):
        time.sleep(0.05)
    stages = json.loads((tmp_path / "record.json").read_text())["stages"]
    assert 0.05 <= stages["images"]["seconds"] < 5
    assert stages["images"]["peak_mib"] > 10


def test_written_when_a_stage_fails(tmp_path: Path) -> None:
    record = RunRecord(tmp_path, {})
    with pytest.raises(RuntimeError, match="boom"), record.stage("reconstruct"):
        raise RuntimeError("boom")
    assert "reconstruct" in json.loads((tmp_path / "record.json").read_text())["stages"]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]  # no temporary file is left


def test_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_the_peak_of_a_stage_is_its_own(tmp_path: Path) -> None:
    if not forget_peak():
        pytest.skip("this system does not let a process forget its peak memory")
    record = RunRecord(tmp_path, {})
    for name, mib in (("small", 1), ("large", 300), ("small_again", 1)):
        with record.stage(name):
            del_me = np.ones(mib * 2**17)
            del del_me
    peaks = {name: facts["peak_mib"] for name, facts in record.facts["stages"].items()}
    assert peaks["large"] - peaks["small"] == pytest.approx(299, abs=30)
    assert peaks["small_again"] < peaks["large"] - 250


def test_what_earlier_jobs_freed_is_not_this_ones_memory(tmp_path: Path) -> None:
    if not forget_peak() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this system does not let a process forget its peak memory, or keeps what is freed")
    record = RunRecord(tmp_path, {})
    with record.stage("before"):
        pass
    before = record.facts["stages"]["before"]["peak_mib"]
    blocks = [bytearray(2**16) for _ in range(3200)]  # 200 MiB below the size that the C library maps by itself
    held = blocks[-1]  # and above the others, which so stay in the heap when they are freed
    cycle: list = [blocks]
    cycle.append(cycle)
    del blocks, cycle
    other = RunRecord(tmp_path, {})
    with other.stage("after"):
        pass
    assert other.facts["stages"]["after"]["peak_mib"] < before + 50
    assert len(held) == 2**16


def test_the_hash_is_that_of_the_recipe_without_places(tmp_path: Path) -> None:
    def named(config: dict, **recipe: dict) -> str:
        return RunRecord(tmp_path, config, **recipe).facts["config_hash"]

    written = {"seed": 0, "model": {"checkpoint": "${paths.data}/w.pth"}, "paths": {"data": "a"}}
    here, there = ({"seed": 0, "model": {"checkpoint": f"{place}/w.pth"}} for place in ("a", "b"))
    assert named(here, named_by=written) == named(there, named_by=written)
    assert named(here, named_by=written) != named(here, named_by=written | {"seed": 1})


def test_the_gpu_is_named_only_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert machine(torch.device("cuda")) == "a GPU"
    assert machine() == machine(torch.device("cpu"))
    assert machine().endswith(f", {torch.get_num_threads()} threads")
