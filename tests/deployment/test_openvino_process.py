"""OpenVINO in a process of its own: what it answers, and how it ends. Nothing here imports it into this process."""

from __future__ import annotations

import gc
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from deployment.openvino_model import OpenVINOModel, RuntimeProcessError
from deployment.openvino_process import answered
from deployment.runtime import session


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
    with pytest.raises(ValueError, match=r"openvino: expected inputs and outputs by the model's own names.*none"):
        model.run(["none"], {"x": X})
    assert np.array_equal(model.run(["z"], {"x": X})[0], -X)


def test_its_process_ends_with_it() -> None:
    model = OpenVINOModel(affine())
    process: Any = model._process
    assert process.poll() is None
    del model
    gc.collect()
    assert process.poll() is not None


def test_a_refused_model_keeps_no_process() -> None:
    """Whoever keeps the error keeps the object, through the frames of its traceback."""
    with pytest.raises(ValueError, match="openvino: expected a model that OpenVINO reads") as refused:
        OpenVINOModel(b"no model")
    (kept,) = {id(it): it for entry in refused.traceback if (it := entry.frame.f_locals.get("self"))}.values()
    assert kept._process.poll() is not None


def test_a_process_that_ends_is_reported_with_what_to_do() -> None:
    model = OpenVINOModel(affine())
    model._process.kill()
    model._process.wait()
    with pytest.raises(RuntimeProcessError, match=r"which ended .*exit code -9.*leave OpenVINO out .*report it"):
        model.run(None, {"x": X})
    with pytest.raises(RuntimeProcessError, match=r"ended by an earlier error; load anew"):
        model.run(None, {"x": X})


def test_a_process_that_ended_unseen_is_dropped_without_a_word() -> None:
    model = OpenVINOModel(affine())
    model._process.kill()
    model._process.wait()
    del model
    gc.collect()  # a warning of an error in a finalizer would be an error


def test_what_announces_an_end_is_left_to_who_started_it() -> None:
    """A cluster signals every process of a step before it takes the machine, and the run saves what it has."""
    model = OpenVINOModel(affine())
    for announced in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        model._process.send_signal(announced)
    assert np.array_equal(model.run(["z"], {"x": X})[0], -X)


@pytest.mark.parametrize("where", ["deployment.openvino_model.pickle.dump", "deployment.openvino_model.pickle.load"])
def test_an_interrupted_call_ends_the_process(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to it would be taken for the next one's."""

    def interrupted(request: Any, *arguments: Any, **options: Any) -> None:
        if where.endswith("dump"):
            arguments[0].write(b"half a request")
        raise KeyboardInterrupt

    model = OpenVINOModel(affine())
    with monkeypatch.context() as patched:
        patched.setattr(where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.run(None, {"x": X})
    assert model._process.poll() is not None


def test_an_answer_that_cannot_be_read_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that prints before the answers begin, such as a sitecustomize, must not be waited for."""
    monkeypatch.setattr("deployment.openvino_model.PROGRAM", "print('hello'); import time; time.sleep(60)")
    monkeypatch.setattr("deployment.openvino_model.SECONDS", 0.1)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    with pytest.raises(RuntimeProcessError, match=r"whose answer cannot be read .*exit code None"):
        OpenVINOModel(affine())


def test_prints_are_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import deployment.openvino_process as process, os; kept = process.Model.run; "
    program += "process.Model.run = lambda *given: (os.write(1, b'printed'), kept(*given))[1]; process.main()"
    monkeypatch.setattr("deployment.openvino_model.PROGRAM", f"import sys; sys.path.insert(0, sys.argv[1]); {program}")
    assert np.array_equal(OpenVINOModel(affine()).run(["z"], {"x": X})[0], -X)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="wants Linux's list of what a process has loaded")
def test_the_process_has_neither_torch_nor_what_was_preloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OpenVINO lives with neither; nor does its process take modules from the working folder."""
    (tmp_path / "openvino.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    model = OpenVINOModel(affine())
    loaded = Path(f"/proc/{model._process.pid}/maps").read_text()
    assert "libopenvino" in loaded
    assert "libtorch" not in loaded
    assert "LD_PRELOAD" not in Path(f"/proc/{model._process.pid}/environ").read_text()


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (RuntimeError("no such layer"), ("refused", "no such layer")),
        (ImportError("libtbb.so: not found"), ("missing", "libtbb.so: not found")),
        (KeyError("z"), ("failed", "KeyError: 'z'")),
    ],
)
def test_errors_are_answers(error: Exception, answer: tuple[str, str]) -> None:
    def method(*arguments: Any) -> None:
        raise error

    assert answered(method, ()) == answer


def test_a_package_that_cannot_be_imported_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['openvino'] = None; "
    broken += "import deployment.openvino_process as process; process.main()"
    monkeypatch.setattr("deployment.openvino_model.PROGRAM", broken)
    with pytest.raises(ValueError, match=r"the package openvino, .*pip install calibrant\[openvino\]"):
        OpenVINOModel(affine())
