"""Locks between jobs that share a folder, on one host or several; they end with the jobs that hold them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at what another job does


class Lease:
    """The right to do a piece of work, in a lock file that its owner touches again and again.

    The lock of a process that has died on this host is taken over at once; that of another host, of which only the file
    can be seen, when it has not been touched for `silence` seconds. An owner that was only suspended goes on all the
    same: a lease saves double work, and must not be what keeps a result right.

    Args:
        path: of the lock file.
        silence: seconds; the same for all jobs that share the file.
    """

    def __init__(self, path: Path, silence: float) -> None:
        self.path = path
        self._lock = SoftFileLease(path, lease_duration=silence)

    def acquire(self, timeout: float = 0) -> bool:
        """Whether the work may begin, after at most `timeout` seconds.

        Where no lock file can be written, it may: the work is worth more than the lock.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
        owner = self._lock.owner
        name = "another job" if owner is None else f"process {owner.pid} on {owner.hostname}"
        log.info("waiting for %s: %s does this work", self.path, name)

    def kept_too_long(self, patience: float) -> TimeoutError:
        """What to raise when the lease was not to be had in time."""
        return TimeoutError(
            f"{self.path}: expected the job that holds this lock to finish within {patience:g} s, it did not; "
            "if no job does this work, delete the lock file"
        )
