"""Times are positive, in turns and by name; figures are for the csv, not for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployment.latency import latencies, layer_times, operator_times
from deployment.onnx_export import export_onnx
from deployment.runtime import has_vnni, instructions
from quantizers.layer import float_mode
from tests.deployment.students import LAYER, SIZE, net, noise, student_of


def test_models_are_timed_in_turns_and_against_the_first() -> None:
    student = student_of(net(), (8, 8), symmetric=True)
    with float_mode(student):
        models = {"float": export_onnx(student, SIZE).model.SerializeToString()}
    models["quantized"] = export_onnx(student, SIZE).model.SerializeToString()
    found = latencies(models, noise(2), rounds=3, seconds=0.01)
    assert [row.model for row in found] == ["float", "quantized"]
    assert found[0].speedup == 1
    assert all(row.milliseconds > 0 and row.speedup > 0 for row in found)
    with pytest.raises(ValueError, match="models: expected at least one, got none"):
        latencies({}, noise(1))
    for rounds in (0, 4):
        with pytest.raises(ValueError, match=f"rounds: expected an odd number, .* got {rounds}"):
            latencies(models, noise(1), rounds=rounds)


def test_each_runtime_has_a_first_of_its_own() -> None:
    model = export_onnx(student_of(net(), (8, 8), symmetric=True), SIZE).model.SerializeToString()
    found = latencies({"a": model, "b": model}, noise(1), runtimes=["onnxruntime", "openvino"], rounds=1, seconds=0.01)
    assert [(row.runtime, row.model) for row in found] == [
        ("onnxruntime", "a"), ("onnxruntime", "b"), ("openvino", "a"), ("openvino", "b"),
    ]  # fmt: skip
    assert [row.speedup for row in found if row.model == "a"] == [1, 1]


def test_calls_in_another_process_are_timed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe would count as the model's own time."""
    monkeypatch.setattr("deployment.openvino_model.OpenVINOModel.turn", lambda *given: [2.0, 3.0, 4.0])
    model = export_onnx(student_of(net(), (8, 8), symmetric=True), SIZE).model.SerializeToString()
    (found,) = latencies({"a": model}, noise(1), runtimes=["openvino"], rounds=1, seconds=0.01)
    assert found.milliseconds == 3000


class Clock:
    """A session whose calls take as long as it is told, by a clock of its own."""

    now = 0.0

    def __init__(self, model: Any, **kwargs: Any) -> None:
        self.durations = model
        self.calls = 0

    def run(self, *arguments: Any) -> None:
        Clock.now += self.durations[min(self.calls, len(self.durations) - 1)]
        self.calls += 1


def test_the_first_call_warms_up_and_medians_leave_out_what_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployment.runtime.session", Clock)
    monkeypatch.setattr("deployment.timing.time.perf_counter", lambda: Clock.now)
    found = latencies({"slow": [9.0, 0.02], "fast": [7.0, 0.01, 0.5, 0.01]}, noise(1), rounds=3, seconds=0.05)  # type: ignore[dict-item]
    assert [row.milliseconds for row in found] == pytest.approx([20, 10])
    assert found[1].speedup == pytest.approx(2)


def test_the_profile_names_operators() -> None:
    student = student_of(net(), (8, 8), symmetric=True)
    found = operator_times(export_onnx(student, SIZE).model.SerializeToString(), noise(1), calls=4)
    assert sum(row.operator == "QLinearConv" for row in found) == 2
    assert all(row.microseconds >= 0 for row in found)


def test_every_layer_has_a_float_and_a_quantized_time() -> None:
    student = student_of(net(), (4, 8), symmetric=True)
    found = layer_times(student, SIZE, calls=4)
    assert [row.layer for row in found[::2]] == ["stem", "a", "b", "c", "fc"]
    assert all((row.w_bits, row.a_bits) == (32, 32) for row in found[::2])
    assert [(row.w_bits, row.a_bits) for row in found[1::2]] == [(8, 8), (4, 8), (4, 8), (4, 8), (8, 32)]
    kernels = {row.layer: row.kernel for row in found[1::2]}
    assert kernels["a"] == "QLinearConv"


def test_processors_are_asked_what_they_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr("deployment.runtime.CPUINFO", file)
    for text, expected in ((None, False), ("flags : avx2 fma", False), ("flags : avx2 avx512_vnni", True)):
        if text is not None:
            file.write_text(text)
        has_vnni.cache_clear()
        assert has_vnni() is expected
    has_vnni.cache_clear()


def test_processors_are_named_by_their_widest_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr("deployment.runtime.CPUINFO", file)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert instructions() == "default"
    for flags, expected in {
        "fpu avx avx2": "avx2",
        "avx2 avx512f avx512bw": "avx512",
        "avx2 avx_vnni": "avx_vnni",
        "avx2 avx512f avx_vnni avx512_vnni": "avx512_vnni",
        "avx2 avx512f avx512_vnni amx_bf16 amx_int8": "amx",
        "neon asimd": "default",
    }.items():
        file.write_text(f"flags\t\t: {flags}\n")
        assert instructions() == expected


def test_in_2_bit_models_layers_alone_are_as_in_the_whole() -> None:
    """One such layer keeps onnxruntime from fusing any."""
    student = student_of(net(), (2, 8), protocol=LAYER, symmetric=True)
    kernels = {row.kernel for row in layer_times(student, SIZE, container="int2", calls=4)}
    whole = export_onnx(student, SIZE, container="int2").model.SerializeToString()
    assert not any("QLinear" in row.operator for row in operator_times(whole, noise(1), calls=4))
    assert not any("QLinear" in kernel for kernel in kernels)
