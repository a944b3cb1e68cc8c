"""What a process started for a job needs of this one: where its modules are, and its share of the threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def importable() -> Iterator[None]:
    """Let processes started meanwhile import what this one can, also from a checkout that is not installed."""
    folders = [str(Path(folder).absolute()) for folder in sys.path if folder == "" or Path(folder).is_dir()]
    with changed({"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}):
        yield


def divided(jobs: int) -> dict[str, str]:
    """Variables that give each of `jobs` processes its share of the cores; a smaller number that is set stays."""
    share = max(1, cores() // max(1, jobs))
    return {name: str(min(share, _number(os.environ.get(name), share))) for name in THREADS}


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


@contextmanager
def changed(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text is not None and text.isdigit() and int(text) > 0 else otherwise
