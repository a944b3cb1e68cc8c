"""A model in OpenVINO in a process of its own: the side that asks; `deployment.openvino_process` answers."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deployment.packages import missing

# This package is found where it was found here, others where Python finds them by itself.
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from deployment.openvino_process import main; del sys.path[0]; main()"
)
ROOT = Path(__file__).resolve().parent.parent
LEAVE_OUT = "leave OpenVINO out (export.openvino=false, no --openvino)"
SECONDS = 5  # that an ending process has


class RuntimeProcessError(RuntimeError):
    """The process in which a runtime ran is no more, or cannot be understood."""


class OpenVINOModel:
    """A model in OpenVINO on the CPU, which computes what the file says and in no less precision.

    Its process ends with this object.

    Args:
        model: a file, or a serialized model.
        threads: inside an operator.

    Raises:
        ValueError: for a model that it does not read or compile, such as one of 2-bit integers, or cannot run; if it
            is not installed.
        RuntimeProcessError: if its process ends.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, str(ROOT)],
            # OpenVINO aborts where tcmalloc is preloaded
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._ask("load", model, threads, does="reads")
        except BaseException:  # whoever keeps the error keeps this object too
            self._end()
            raise

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, Any], /) -> list[Any]:
        """The named outputs, or all in their order, as arrays; `inputs` by name."""
        return self._ask("run", outputs, dict(inputs), does="runs")

    def turn(self, inputs: Mapping[str, Any], seconds: float) -> list[float]:
        """`deployment.timing.turn` of calls, timed in the process that makes them."""
        return self._ask("turn", dict(inputs), seconds, does="runs")

    def _ask(self, method: str, *arguments: Any, does: str) -> Any:
        if not self._end.alive:
            raise RuntimeProcessError(
                "openvino: expected a process that runs, which was ended by an earlier error; load anew"
            )
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        try:
            pickle.dump((method, arguments), requests, protocol=pickle.HIGHEST_PROTOCOL)
            requests.flush()
            kind, answer = pickle.load(answers)
        except (EOFError, OSError) as error:
            raise self._ended("which ended", error) from error
        except Exception as error:  # unpickling what is no pickle raises anything
            raise self._ended("whose answer cannot be read", error) from error
        except BaseException:  # half a request or half an answer is in the pipe: nothing more can be asked
            self._end()
            raise
        if kind == "done":
            return answer
        raise _refusal(kind, answer, does)

    def _ended(self, how: str, error: Exception) -> RuntimeProcessError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS)
        code = self._process.poll()
        self._end()
        return RuntimeProcessError(
            f"openvino: expected its process to answer, {how} ({error or type(error).__name__}, exit code {code}); it "
            f"may have said why on standard error; {LEAVE_OUT}, and report it"
        )


def _refusal(kind: str, answer: str, does: str) -> ValueError:
    if kind == "missing":
        return missing("openvino", answer)
    if kind == "failed":
        return ValueError(f"openvino: expected inputs and outputs by the model's own names and types ({answer})")
    return ValueError(
        f"openvino: expected a model that OpenVINO {does}, which it refuses ({' '.join(answer.split())[:300]}); "
        f"choose another container (export.container, --container), or {LEAVE_OUT}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # it holds nothing; a forked worker of this process may keep the pipe open
    with suppress(OSError), process:  # closes the pipes, of which one may hold half a request, and waits
        pass
