"""onnx and onnxruntime, imported when they are first needed: quantizing does without them."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

# On x86 without VNNI, sums of two products of unsigned and signed bytes saturate at 16 bits. With this, weights of more
# than 7 bits become unsigned instead, which is exact and on other processors needlessly slow.
EXACT_WITHOUT_VNNI = ("session.x64quantprecision", "1")
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = {  # name -> flag, best first
    "amx": "amx_int8",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512": "avx512f",
    "avx2": "avx2",
}


def require(package: str) -> Any:
    """The package `onnx` or `onnxruntime`.

    Raises:
        ValueError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"export: expected the package {package}, which cannot be imported ({error}); pip install calibrant[export]"
        ) from error


@functools.cache
def has_vnni() -> bool:
    """Whether the processor says that it multiplies bytes exactly; False where that is not known."""
    return CPUINFO.exists() and "vnni" in CPUINFO.read_text()


def instructions() -> str:
    """The widest instructions for bytes that the processor says it has, a name of `INSTRUCTIONS`; what torch calls them
    where the system does not tell."""
    if CPUINFO.exists():
        flags = set(CPUINFO.read_text().split())
        for name, flag in INSTRUCTIONS.items():
            if flag in flags:
                return name
    return torch.backends.cpu.get_cpu_capability().lower()


def session(
    model: Path | bytes,
    *,
    threads: int = 1,
    optimize: bool = True,
    optimized: Path | None = None,
    profile: Path | None = None,
) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        model: a file, or a serialized model.
        threads: inside an operator; operators run one after another.
        optimize: whether the graph is fused; False: run as it is, such as one that was written fused.
        optimized: where the graph is written as the runtime fused it.
        profile: prefix of a file with the seconds of every operator, written when the session's profile ends.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors: warnings speak of initializers that fusing has made superfluous
    if not has_vnni():
        options.add_session_config_entry(*EXACT_WITHOUT_VNNI)
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    source = model if isinstance(model, bytes) else str(model)
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
