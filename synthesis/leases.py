"""Locks between jobs that share a folder, on one host or several; they end with the jobs that hold them."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at what another job does


class Lease:
    """The right to do a piece of work, in a lock file that its owner touches again and again.

    The lock of a process that has died on this host is taken over at once; that of another host, of which only the file
    can be seen, when it has not been touched for `silence` seconds, before or after the first look at it. An owner that
    was only suspended goes on all the same: a lease saves double work, and must not be what keeps a result right.

    Args:
        path: of the lock file.
        silence: seconds; the same for all jobs that share the file.
    """

    def __init__(self, path: Path, silence: float) -> None:
        self.path = path
        self.silence = silence
        self._next_look = 0.0
        self._lock = SoftFileLease(path, lease_duration=silence)

    def acquire(self, timeout: float = 0) -> bool:
        """Whether the work may begin, after at most `timeout` seconds.

        Where no lock file can be written, it may: the work is worth more than the lock.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_silent()
            self._lock.acquire(timeout=timeout, poll_interval=POLL)
        except Timeout:
            return False
        except OSError as error:
            log.warning("no lock %s (%s): other jobs may do the same work meanwhile", self.path, error)
        return True

    def release(self) -> None:
        """Let others have it; nothing if it is not held."""
        self._lock.release()

    @contextmanager
    def held(self, patience: float) -> Iterator[None]:
        """Hold the lease in a `with` block, waiting for it where another job has it.

        Raises:
            TimeoutError: after `patience` seconds.
        """
        if not self.acquire():
            self.announce()
            if not self.acquire(patience):
                raise self.kept_too_long(patience)
        try:
            yield
        finally:
            self.release()

    def announce(self) -> None:
        """Log that this job waits, and for whom."""
        log.info("waiting for %s: %s does this work", self.path, self.holder)

    @property
    def holder(self) -> str:
        """Who has it, in words."""
        owner = self._lock.owner
        return "another job" if owner is None else f"process {owner.pid} on {owner.hostname}"

    def kept_too_long(self, patience: float) -> TimeoutError:
        """What to raise when the lease was not to be had in time."""
        return TimeoutError(
            f"{self.path}: expected the job that holds this lock to finish within {patience:g} s, it did not; "
            "if no job does this work, delete the lock file"
        )

    def _remove_silent(self) -> None:
        """Remove the lock of another host whose silence began before this process first saw it."""
        now = time.monotonic()
        if now < self._next_look or not self.path.exists():
            return
        self._next_look = now + self.silence / 20
        owner = self._lock.owner
        if owner is not None and owner.hostname == socket.gethostname():
            return  # of a process that can be looked at
        with suppress(OSError):  # it is gone, or no file can be written: no lock is removed
            seen = self.path.stat()
            if self._file_time() - seen.st_mtime > self.silence:
                log.warning("%s: taken over from %s, silent for more than %g s", self.path, self.holder, self.silence)
                self._remove(seen)

    def _file_time(self) -> float:
        """Now, by the clock that stamps the files here, which on a network file system is not this host's."""
        beside = self._beside()
        try:
            beside.touch()
            return beside.stat().st_mtime
        finally:
            beside.unlink(missing_ok=True)

    def _remove(self, seen: os.stat_result) -> None:
        """Remove the lock file, unless it is no longer the one that was seen."""
        aside = self._beside()
        self.path.rename(aside)
        try:
            found = aside.stat()
            if (found.st_ino, found.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
                with suppress(OSError):
                    self.path.hardlink_to(aside)
        finally:
            aside.unlink(missing_ok=True)

    def _beside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
