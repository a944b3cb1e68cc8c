"""What reads and runs an exported file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from deployment.openvino_model import OpenVINOModel
from deployment.packages import require
from deployment.timing import turn

Runtime = Literal["onnxruntime", "openvino"]

# On x86 without VNNI, sums of two products of unsigned and signed bytes saturate at 16 bits. With this, weights of more
# than 7 bits become unsigned instead, which is exact and on other processors needlessly slow.
EXACT_WITHOUT_VNNI = ("session.x64quantprecision", "1")
# onnxruntime (1.32) makes integer layers of 2-bit weights, for which it has no kernels, and refuses them. With this
# everything is computed in float, as the file says.
WITHOUT_FUSION = ("session.disable_quant_qdq", "1")
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = {  # name -> flag, best first
    "amx": "amx_int8",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512": "avx512f",
    "avx2": "avx2",
}


def runtimes(*, openvino: bool) -> list[Runtime]:
    """Those that are asked for; onnxruntime always, and first."""
    return ["onnxruntime", "openvino"] if openvino else ["onnxruntime"]


class Loaded(Protocol):
    """A model ready to run."""

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, Any], /) -> Sequence[Any]:
        """The named outputs, or all in their order, as arrays; `inputs` by name."""
        ...

    def turn(self, inputs: Mapping[str, Any], seconds: float) -> list[float]:
        """`deployment.timing.turn` of calls, timed in the process that makes them."""
        ...


@cache
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
        profile: prefix of a file with the seconds of every operator, written when profiling ends.
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
    if container_of(model) == "int2":
        options.add_session_config_entry(*WITHOUT_FUSION)
    source = model if isinstance(model, bytes) else str(model)
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def container_of(model: Path | bytes) -> str | None:
    """The container that an ONNX model, a file or serialized, says it was written in; None where it says none."""
    read = require("onnx").ModelProto()
    try:
        read.ParseFromString(model if isinstance(model, bytes) else Path(model).read_bytes())
    except (OSError, require("google.protobuf.message").DecodeError):
        return None  # who runs it will say why it is no model
    return next((entry.value for entry in read.metadata_props if entry.key == "container"), None)


class OnnxruntimeModel:
    """A model in onnxruntime on the CPU, in this process; `threads`: inside an operator."""

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        self._session = session(model, threads=threads)

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, Any], /) -> Sequence[Any]:
        """The named outputs, or all in their order, as arrays; `inputs` by name."""
        return self._session.run(outputs, inputs)

    def turn(self, inputs: Mapping[str, Any], seconds: float) -> list[float]:
        """`deployment.timing.turn` of calls."""
        return turn(partial(self._session.run, None, inputs), seconds)


def load(model: Path | bytes, runtime: Runtime = "onnxruntime", *, threads: int = 1) -> Loaded:
    """The model in a runtime, on the CPU."""
    if runtime == "openvino":
        return OpenVINOModel(model, threads=threads)
    return OnnxruntimeModel(model, threads=threads)
