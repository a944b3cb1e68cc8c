"""onnx and onnxruntime, imported when they are first needed: quantizing does without them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# U8S8 products saturate 16 bits on CPUs with AVX2 but no VNNI; with this the kernels widen the weights instead.
EXACT_ON_AVX2 = ("session.x64quantprecision", "1")


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


def session(
    model: Path | bytes, *, threads: int = 1, optimized: Path | None = None, profile: Path | None = None
) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        model: a file, or a serialized model.
        threads: inside an operator; operators run one after another.
        optimized: where the graph is written as the runtime fused it.
        profile: prefix of a file with the seconds of every operator, written when the session's profile ends.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors: warnings speak of initializers that fusing has made superfluous
    options.add_session_config_entry(*EXACT_ON_AVX2)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    source = model if isinstance(model, bytes) else str(model)
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
