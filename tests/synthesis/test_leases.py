"""Leases: the dead lose them, on this host at once and on another after a silence; the living keep them."""

from __future__ import annotations

import logging
import os
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


def left_abroad(lease: Lease, monkeypatch: pytest.MonkeyPatch, *, silent_for: float = 0.0) -> None:
    """Leave the lock file that a host leaves which lost its power `silent_for` seconds ago."""
    abroad(lease, monkeypatch)
    left = lease.path.read_bytes()
    lease.release()
    lease.path.write_bytes(left)
    then = lease.path.stat().st_mtime - silent_for
    os.utime(lease.path, (then, then))


def test_a_dead_host_is_followed_after_its_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, silence = tmp_path / "lock", 1.0
    left_abroad(Lease(path, silence), monkeypatch)
    heir, started = Lease(path, silence), time.monotonic()
    assert not heir.acquire()
    with heir.held(patience=20):
        assert silence - 0.1 < time.monotonic() - started < 5


def test_a_silence_that_began_before_the_first_look_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    left_abroad(Lease(path, 600), monkeypatch, silent_for=590)
    assert not Lease(path, 600).acquire()
    left_abroad(Lease(tmp_path / "other", 600), monkeypatch, silent_for=610)
    heir = Lease(tmp_path / "other", 600)
    assert heir.acquire()
    assert f"taken over from process {os.getpid()} on elsewhere" in caplog.text
    heir.release()
    assert list(tmp_path.iterdir()) == [path]


def test_the_clock_of_this_host_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_abroad(Lease(tmp_path / "lock", 600), monkeypatch)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert not Lease(tmp_path / "lock", 600).acquire()


def test_a_process_of_this_host_that_lives_is_not_followed_however_old_its_lock(tmp_path: Path) -> None:
    owner = Lease(tmp_path / "lock", 600)
    assert owner.acquire()
    os.utime(owner.path, (1.0, 1.0))  # as after the sleep of a laptop
    assert not Lease(tmp_path / "lock", 600).acquire()
    owner.release()


def test_a_living_host_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, other = Lease(tmp_path / "lock", 0.9), Lease(tmp_path / "lock", 0.9)
    abroad(owner, monkeypatch)
    assert not other.acquire(timeout=2.5)
    owner.release()
    assert other.acquire()
    other.release()


def test_attempts_without_patience_also_notice_a_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore(tmp_path, patience=20, silence=0.9)
    left_abroad(store._lease({**RECIPE, "part": 0}), monkeypatch)
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


def test_what_another_host_left_in_the_store_long_ago_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SampleStore(tmp_path)
    for part, silent_for in enumerate((0.0, 700.0)):
        left_abroad(store._lease({**RECIPE, "part": part}), monkeypatch, silent_for=silent_for)
    store.forget_dead()
    assert list(tmp_path.iterdir()) == [store._lease({**RECIPE, "part": 0}).path]
