"""Leases: the dead lose them, on this host at once and on another after a silence; the living keep them."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from synthesis.leases import Lease
from synthesis.store import SampleStore
from tests.configuration import ROOT

RECIPE = {"teacher": "abc"}
IMAGES = torch.ones(1, 1, 2, 2)

HANGS = """
import sys, time
from pathlib import Path
from synthesis.store import SampleStore

def make():
    Path(sys.argv[1], "begun").touch()
    time.sleep(600)

SampleStore(Path(sys.argv[1])).get_or_make({"teacher": "abc"}, make)
"""


def test_a_process_killed_in_its_work_is_followed_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with caplog.at_level(logging.INFO), pytest.raises(TimeoutError, match="delete the lock file"):
            SampleStore(tmp_path, patience=0.5).get_or_make(RECIPE, lambda: IMAGES)  # it lives, and is waited for
        assert (
            f"waiting for {SampleStore(tmp_path).path(RECIPE).with_suffix('.lock')}: process {job.pid}" in caplog.text
        )
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    started = time.monotonic()
    assert torch.equal(SampleStore(tmp_path).get_or_make(RECIPE, lambda: IMAGES), IMAGES)
    assert time.monotonic() - started < 5
    assert not list(tmp_path.glob("*.lock"))


def abroad(lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acquire as a process of another host would."""
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        assert lease.acquire()


def test_a_dead_host_is_followed_after_its_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, silence = tmp_path / "lock", 1.0
    dead = Lease(path, silence)
    abroad(dead, monkeypatch)
    left = path.read_bytes()
    dead.release()
    path.write_bytes(left)  # what a host leaves that lost its power
    heir, started = Lease(path, silence), time.monotonic()
    assert not heir.acquire()
    with heir.held(patience=20):
        assert silence - 0.1 < time.monotonic() - started < 5


def test_a_living_host_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = Lease(tmp_path / "lock", 0.9), Lease(tmp_path / "lock", 0.9)
    abroad(owner, monkeypatch)
    assert not other.acquire(timeout=2.5)
    owner.release()
    assert other.acquire()
    other.release()


def test_attempts_without_patience_also_notice_a_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore(tmp_path, patience=20, silence=0.9)
    dead = store._lease({**RECIPE, "part": 0})
    abroad(dead, monkeypatch)
    left = dead.path.read_bytes()
    dead.release()
    dead.path.write_bytes(left)
    assert torch.equal(store.get_or_gather(RECIPE, 1, lambda _: IMAGES), IMAGES)


def test_one_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with Lease(tmp_path / "lock", 600).held(patience=20):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
