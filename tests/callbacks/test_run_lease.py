"""One process a run's folder: the second is told who is there; a requeued job waits for what it was before."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from callbacks import run_lease
from callbacks.run_lease import LOCK, at_work, only_run_in
from tests.configuration import ROOT
from tests.synthesis.test_leases import left_abroad

DIES = """
import os, sys
from pathlib import Path
from callbacks.run_lease import only_run_in

with only_run_in(Path(sys.argv[1]), requeued=False):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lease, "PATIENCE_S", 0.3)


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    who = rf"process {os.getpid()} on {socket.gethostname()} is in .*; wait for it, or stop it .*resume="
    with only_run_in(tmp_path, requeued=False):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(ValueError, match=who), only_run_in(tmp_path, requeued=False):
            pass
        assert list(at_work([tmp_path, tmp_path / "other"], 0)) == [tmp_path]
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_killed_is_followed_at_once(tmp_path: Path) -> None:
    for follow in (lambda: at_work([tmp_path], 0), lambda: only_run_in(tmp_path, requeued=False).__enter__().release()):
        done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], cwd=ROOT, check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert (tmp_path / LOCK).exists()
        assert not follow()
        assert not list(tmp_path.iterdir())


def test_a_requeued_job_waits_for_the_host_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lease, "SILENCE", 2.0)
    left_abroad(run_lease.run_lease(tmp_path), monkeypatch)
    with pytest.raises(ValueError, match="on elsewhere is in"), only_run_in(tmp_path, requeued=False):
        pass
    started = time.monotonic()
    with only_run_in(tmp_path, requeued=True):
        assert 1.0 < time.monotonic() - started < 4.0


def test_who_leaves_in_time_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_abroad(run_lease.run_lease(tmp_path), monkeypatch)
    ends = threading.Timer(0.5, (tmp_path / LOCK).unlink)
    ends.start()
    assert at_work([tmp_path], 5) == {}
    ends.join()
