"""Who is at work in the folder of a run: the one process whose lock stands there."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from synthesis.leases import Lease

LOCK = "run.lock"
SILENCE = 180.0  # seconds without a sign of life, given every 60, after which a run on another host counts as dead
PATIENCE_S = 2.0


def run_lease(folder: Path) -> Lease:
    """The right to write in the folder of a run, which ends with the process that holds it."""
    return Lease(folder / LOCK, SILENCE)


@contextmanager
def only_run_in(folder: Path, *, requeued: bool) -> Iterator[Lease]:
    """Hold the lease of a folder in a `with` block.

    Args:
        folder: of the run.
        requeued: wait for an earlier life of this job, which may have died on another host, until it counts as dead.

    Raises:
        ValueError: if another process is at work there.
    """
    lease = run_lease(folder)
    if not lease.acquire(PATIENCE_S):
        lease.announce()
        if not requeued or not lease.acquire(SILENCE + PATIENCE_S):
            raise ValueError(
                f"hydra.run.dir: expected a folder in which no other process is at work, but {lease.holder} is in "
                f"{folder}; wait for it, or stop it (kill, or scancel where it is a job of Slurm's) and go on with "
                f"resume={folder}"
            )
    try:
        yield lease
    finally:
        lease.release()


def at_work(folders: Iterable[Path], patience: float) -> dict[Path, str]:
    """Where a process is still at work after `patience` seconds, and which; removes locks of the dead."""
    end = time.monotonic() + patience
    found: dict[Path, str] = {}
    for folder in folders:
        lease = run_lease(folder)
        if not lease.path.exists():
            continue
        if lease.acquire(max(0.0, end - time.monotonic())):
            lease.release()
        else:
            found[folder] = lease.holder
    return found
