"""OpenVINO in a process of its own, which `deployment.openvino_model` starts and asks.

Within a process that has torch and onnxruntime OpenVINO 2026.4 was not safe: some ended without a message long after
their last call, and with tcmalloc preloaded they abort at once. Requests come pickled on standard input, answers go to
what standard output was; the end of the input ends the process.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from deployment.timing import turn

# Left to itself OpenVINO computes in bfloat16 where the processor has it, and in linear layers with integer weights it
# quantizes float inputs anew at every call, by ranges of its own.
EXACT = {"EXECUTION_MODE_HINT": "ACCURACY"}
ANNOUNCED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # to a whole group; who started this one answers them


class Model:
    """A model compiled for the CPU; `threads`: inside an operator."""

    def __init__(self, model: Path | bytes, threads: int) -> None:
        import openvino

        core = openvino.Core()
        read = core.read_model(model, b"") if isinstance(model, bytes) else core.read_model(str(model))
        self._compiled = core.compile_model(read, "CPU", EXACT | {"INFERENCE_NUM_THREADS": threads})
        self._request = self._compiled.create_infer_request()

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, Any]) -> list[Any]:
        """The named outputs, or all in their order, as arrays that the next call overwrites."""
        found = self._request.infer(dict(inputs), share_inputs=True, share_outputs=True)
        return [found[key] for key in (self._compiled.outputs if outputs is None else outputs)]

    def turn(self, inputs: Mapping[str, Any], seconds: float) -> list[float]:
        """Seconds of calls, timed on this side of the pipe."""
        return turn(lambda: self._request.infer(dict(inputs), share_inputs=True), seconds)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers each (name of a method, arguments), as `answered` does, until the requests end."""
    methods: dict[str, Callable[..., Any]] = {}

    def load(*arguments: Any) -> None:
        model = Model(*arguments)
        methods.update(run=model.run, turn=model.turn)

    methods["load"] = load
    while True:
        try:
            name, arguments = pickle.load(requests)
        except EOFError:
            return
        answer = answered(methods[name], arguments)
        pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()
        del arguments, answer  # as large as images and tensors are, until the next request


def answered(method: Callable[..., Any], arguments: Sequence[Any]) -> tuple[str, Any]:
    """("done", what the method gives), or the reason behind "missing" (OpenVINO), "refused" (by it) or "failed"."""
    try:
        return "done", method(*arguments)
    except ImportError as error:
        return "missing", str(error)
    except RuntimeError as error:  # OpenVINO's own are of no class of theirs
        return "refused", str(error)
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"


def main() -> None:
    """Serve until the input ends."""
    for name in ANNOUNCED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    with suppress(BrokenPipeError):  # nobody waits for the answer any more
        serve(sys.stdin.buffer, channel)
    os._exit(0)  # nothing is left to write, and OpenVINO's own teardown is not to be waited for
