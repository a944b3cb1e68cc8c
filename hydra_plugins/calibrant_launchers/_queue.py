"""Which jobs of an earlier go of a sweep Slurm still runs or keeps waiting: they write in folders of the next one."""

from __future__ import annotations

import csv
import getpass
import logging
import shutil
import subprocess
from pathlib import Path

log = logging.getLogger(__name__)

TABLE = "jobs.csv"  # in the folder of the logs: which job is which
ANSWER_WITHIN_S = 60


def refuse_queued(tables: set[Path]) -> None:
    """Raise while Slurm has jobs of these tables.

    Raises:
        ValueError: if it has.
    """
    queued = [job for table in sorted(tables) for job in still_queued(table)]
    if queued:
        raise ValueError(
            f"hydra.sweep.dir: expected a sweep of which Slurm has no jobs any more, but {len(queued)} of an earlier "
            f"go run or wait; wait for them, or end them with: scancel {' '.join(queued)}"
        )


def still_queued(table: Path) -> list[str]:
    """The ids in a table of jobs that are in Slurm's queue; none where there is no Slurm, or it does not answer."""
    if not table.exists() or shutil.which("squeue") is None:
        return []
    with table.open(newline="") as file:
        ids = [row["slurm_id"] for row in csv.DictReader(file)]
    asked = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=ANSWER_WITHIN_S)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s (%s): jobs of an earlier go may still wait", " ".join(asked), error)
        return []
    queued = set(done.stdout.split())
    return [one for one in dict.fromkeys(ids) if one in queued]
