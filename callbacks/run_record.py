"""What a run did, kept beside its results: configuration, versions, images, metrics, seconds, peak memory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import platform
import re
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

from deployment.whole_file import whole_file

PACKAGES = (
    "calibrant", "torch", "torchvision", "pytorch-lightning", "hydra-core", "timm", "numpy", "scipy", "onnx",
    "onnxruntime", "openvino", "pulp", "cbcbox",
)  # fmt: skip

# What gives freed memory back to the system, where it is loaded into the process: of the C library, of tcmalloc.
RELEASES = (("malloc_trim", (ctypes.c_size_t(0),)), ("MallocExtension_ReleaseFreeMemory", ()))

# What says where and how a run is watched, not what it computes.
UNHASHED = (
    "share_synthesis", "share_reconstruction", "paths", "logger", "callbacks", "resume", "evaluate", "show", "tags",
    "export", "sweep",
)  # fmt: skip


class RunRecord:
    """Collects facts stage by stage and writes `record.json` after each, so that a failed run leaves one too.

    Args:
        folder: the run's output folder.
        config: the resolved configuration as plain containers.
        named_by: what `config_hash` is made of: the configuration with its interpolations as they are written, so that
            it does not depend on where the files lie; None: `config`.
        device: where the run computes; None: the CPU.
        write: whether this process writes the file; of several processes of one run, only the first.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        named_by: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        write: bool = True,
    ) -> None:
        give_back()
        self.folder = folder
        self.on_gpu = device is not None and device.type == "cuda"
        self.writes = write
        named_by = config if named_by is None else named_by
        self.facts: dict[str, Any] = {
            "status": "running",
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": config,
            "config_hash": config_hash(named_by),
            "versions": versions(),
            "commit": commit(),
            "machine": machine(device),
            "stages": {},
        }

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure wall seconds and peak memory of a `with` block under `stages.<name>`; stages do not nest."""
        started = time.perf_counter()
        forget_peak()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            facts = {"seconds": round(time.perf_counter() - started, 3), "peak_mib": round(peak_mib(), 1)}
            if self.on_gpu:
                facts["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            self.facts["stages"][name] = facts
            self.write()

    def add(self, **facts: Any) -> None:
        """Put facts at the top level and write the file."""
        self.facts.update(facts)
        self.write()

    def write(self) -> None:
        """Write `record.json` by a temporary name and a rename."""
        if not self.writes:
            return
        with whole_file(self.folder / "record.json") as temporary:
            temporary.write_text(json.dumps(self.facts, indent=2, default=str) + "\n")


def config_hash(named_by: Mapping[str, Any]) -> str:
    """The name of what a configuration computes, whoever watches and wherever its files lie."""
    return digest({key: value for key, value in named_by.items() if key not in UNHASHED})


def has_export(record: Mapping[str, Any], export: Mapping[str, Any] | None) -> bool:
    """Whether the run of a record wrote for other runtimes what this setting asks for; the hash leaves that out.

    A switch that is off counts as one that was not there yet when the run was made.
    """
    wrote = record.get("config", {}).get("export") or {}
    return not export or _without_off(wrote) == _without_off(export)


def _without_off(export: Mapping[str, Any]) -> str:
    return digest({key: value for key, value in export.items() if value is not False})


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
    """Commit of the checkout this code runs from, with `+` where files were changed; None outside a checkout.

    Results do not count: a benchmark of several sweeps writes them between two of its runs, and no run reads them.
    """
    here = Path(__file__).resolve().parent
    changed = ["git", "status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results"]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        state = subprocess.run(changed, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()[:12] + ("+" if state.stdout.strip() else "")


def machine(device: torch.device | None = None) -> str:
    """The GPU's name where `device` is one, else the processor and the number of threads, in words."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def give_back() -> None:
    """Give what earlier jobs of the process freed back to the system, or it would count as this job's memory."""
    gc.collect()
    process = ctypes.CDLL(None)
    for name, arguments in RELEASES:
        if (release := getattr(process, name, None)) is not None:
            release(*arguments)


def forget_peak() -> bool:
    """Start measuring the process's peak memory anew; False where the system cannot, and the peak is that of its life.

    Linux counts from the present memory again when 5 is written to `/proc/self/clear_refs` (proc(5)).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """Peak MiB of the process on the host since `forget_peak`, or of its life where that is not known."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
