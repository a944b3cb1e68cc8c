"""OpenVINO in a process of its own: what it answers, and how it ends. Nothing here imports it into this process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from deployment.runtime import OpenVINOModel, session


def affine() -> bytes:
    """y = 2 x + 1 and z = -x, of any batch."""
    shape = ["batch", 3]
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["m"]),
        helper.make_node("Add", ["m", "one"], ["y"]),
        helper.make_node("Neg", ["x"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "affine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("y", "z")],
        [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("two", 2.0), ("one", 1.0))],
    )
    opset = helper.make_opsetid("", 21)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def model() -> OpenVINOModel:
    return OpenVINOModel(affine())


def test_all_outputs_in_order_and_named_ones_as_asked(model: OpenVINOModel) -> None:
    y, z = model.run(None, {"x": X})
    assert np.array_equal(y, 2 * X + 1)
    assert np.array_equal(z, -X)
    assert np.array_equal(model.run(["z"], {"x": X})[0], -X)


def test_against_onnxruntime_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(affine())
    expected = session(tmp_path / "model.onnx").run(None, {"x": X})
    found = OpenVINOModel(tmp_path / "model.onnx", threads=2).run(None, {"x": X})
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_answer_outlives_the_next_call(model: OpenVINOModel) -> None:
    first = model.run(["z"], {"x": X})[0]
    model.run(["z"], {"x": X + 1})
    assert np.array_equal(first, -X)


def test_calls_are_timed_at_least_three(model: OpenVINOModel) -> None:
    times = model.turn({"x": X}, 0.0)
    assert len(times) == 3
    assert all(0 < time < 10 for time in times)


def test_a_refusal_leaves_the_model_usable(model: OpenVINOModel) -> None:
    with pytest.raises(ValueError, match=r"openvino: expected a model that OpenVINO runs.*export\.openvino=false"):
        model.run(None, {"x": np.zeros((2, 4), np.float32)})
    assert np.array_equal(model.run(["z"], {"x": X})[0], -X)


def test_its_process_ends_with_it() -> None:
    model = OpenVINOModel(affine())
    process: Any = model._process
    assert process.poll() is None
    del model
    gc.collect()
    assert process.poll() is not None


def test_a_process_that_ends_is_reported_with_what_to_do() -> None:
    model = OpenVINOModel(affine())
    os.kill(model._process.pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"ended with -9 .*the student is saved: leave OpenVINO out"):
        model.run(None, {"x": X})


def test_an_interrupted_call_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to it would be taken for the next one's."""

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    model = OpenVINOModel(affine())
    monkeypatch.setattr("deployment.runtime.pickle.load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.run(None, {"x": X})
    assert model._process.poll() is not None


def test_the_process_has_neither_torch_nor_what_was_preloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both are what OpenVINO does not live with; nor does it take modules from the working folder."""
    seen: dict[str, Any] = {}

    def started(command: list[str], **options: Any) -> Any:
        seen.update(command=command, **options)
        raise InterruptedError

    (tmp_path / "openvino.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with monkeypatch.context() as patched:
        patched.setattr("deployment.runtime.subprocess.Popen", started)
        with pytest.raises(InterruptedError):
            OpenVINOModel(affine())
    assert "LD_PRELOAD" not in seen["env"]
    program = "import sys, deployment.openvino_process, openvino; print('torch' in sys.modules, openvino.__version__)"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", program], env=seen["env"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[0] == "False"
    assert "-P" in seen["command"]
