"""What a run did, kept beside its results: configuration, versions, images, metrics, seconds, peak memory."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("calibrant", "torch", "torchvision", "pytorch-lightning", "hydra-core", "timm", "numpy", "scipy")

# What says where and how a run is watched, not what it computes.
UNHASHED = ("share_synthesis", "paths", "logger", "callbacks", "resume", "evaluate", "show", "tags")


class RunRecord:
    """Collects facts stage by stage and writes `record.json` after each, so that a failed run leaves one too.

    Args:
        folder: the run's output folder.
        config: the resolved configuration as plain containers.
        write: whether this process writes the file; of several processes of one run, only the first.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], *, write: bool = True) -> None:
        self.folder = folder
        self.writes = write
        self.facts: dict[str, Any] = {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config,
            "config_hash": digest({key: value for key, value in config.items() if key not in UNHASHED}),
            "versions": versions(),
            "commit": commit(),
            "machine": machine(),
            "stages": {},
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure wall seconds and peak memory of a `with` block under `stages.<name>`."""
        started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            self.facts["stages"][name] = {"seconds": round(time.perf_counter() - started, 3), **peak_memory()}
            self.write()

    def add(self, **facts: Any) -> None:
        """Put facts at the top level and write the file."""
        self.facts.update(facts)
        self.write()

    def write(self) -> None:
        """Write `record.json` by a temporary name and a rename."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / "record.json.tmp"
        temporary.write_text(json.dumps(self.facts, indent=2, default=str) + "\n")
        temporary.replace(self.folder / "record.json")


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Installed versions of what a number depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the checkout this code runs from, with `+` where files were changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        state = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()[:12] + ("+" if state.stdout.strip() else "")


def machine() -> str:
    """Processor or GPU and the number of threads, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def peak_memory() -> dict[str, float]:
    """Peak MiB so far: of the process on the host, and of this stage on the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    found = {"peak_mib": round(peak, 1)}
    if torch.cuda.is_available():
        found["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found
