"""What reads and runs an exported file, imported when it is first needed: quantizing does without it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

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


EXTRAS = {"openvino": "openvino"}  # package -> what brings it, where that is not `export`


def runtimes(*, openvino: bool) -> list[Runtime]:
    """Those that are asked for; onnxruntime always, and first."""
    return ["onnxruntime", "openvino"] if openvino else ["onnxruntime"]


class Loaded(Protocol):
    """A model ready to run."""

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, Any], /) -> Sequence[Any]:
        """The named outputs, or all in their order, as arrays; `inputs` by name."""
        ...


def require(package: str) -> Any:
    """The package `onnx` or `onnxruntime`.

    Raises:
        ValueError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise missing(package, error) from error


def missing(package: str, reason: object) -> ValueError:
    """What is raised where a package cannot be imported."""
    return ValueError(
        f"export: expected the package {package}, which cannot be imported ({reason}); "
        f"pip install calibrant[{EXTRAS.get(package, 'export')}]"
    )


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


class OpenVINOModel:
    """A model in OpenVINO on the CPU, which computes what the file says and in no less precision.

    It runs in a process of its own, `deployment.openvino_process`, which ends with this object.

    Args:
        model: a file, or a serialized model.
        threads: inside an operator.

    Raises:
        ValueError: for a model that it does not read or compile, such as one of 2-bit integers, or cannot run.
        ChildProcessError: if its process ends.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        if importlib.util.find_spec("openvino") is None:
            raise missing("openvino", "there is none")
        root = str(Path(__file__).resolve().parent.parent)
        inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # aborts with tcmalloc
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deployment.openvino_process"],  # -P: not from the working folder
            env=inherited | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._end = weakref.finalize(self, _end, self._process)
        self._ask("load", model, threads, does="reads")

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, Any], /) -> list[Any]:
        """The named outputs, or all in their order, as arrays; `inputs` by name."""
        return self._ask("run", outputs, dict(inputs), does="runs")

    def turn(self, inputs: Mapping[str, Any], seconds: float) -> list[float]:
        """`deployment.timing.turn` of calls, timed in the process that makes them."""
        return self._ask("turn", dict(inputs), seconds, does="runs")

    def _ask(self, method: str, *arguments: Any, does: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((method, arguments), self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            done, answer = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            raise ChildProcessError(
                f"openvino: expected its process to answer, which ended with {code} (what it said stands above); the "
                "student is saved: leave OpenVINO out (export.openvino=false, no --openvino), and report it"
            ) from error
        except BaseException:  # half a request or half an answer is in the pipe: nothing more can be asked
            self._end()
            raise
        if done:
            return answer
        raise ValueError(
            f"openvino: expected a model that OpenVINO {does}, which it refuses ({' '.join(answer.split())[:300]}); "
            "choose another container (export.container, --container), or leave OpenVINO out (export.openvino=false, "
            "no --openvino)"
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # it holds nothing; a forked worker of this process may keep the pipe open
    with process:
        pass  # closes the pipes and waits


def load(model: Path | bytes, runtime: Runtime = "onnxruntime", *, threads: int = 1) -> Loaded:
    """The model in a runtime, on the CPU."""
    if runtime == "openvino":
        return OpenVINOModel(model, threads=threads)
    return session(model, threads=threads)
