"""Disagreements, small ones too, are found and named by tensor and layer; exact arithmetic agrees bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deployment.onnx_export import Exported, export_onnx
from deployment.openvino_model import OpenVINOModel
from deployment.origins import origins_of
from deployment.parity import Parity, ParityError, TensorParity, compare, expect_parity, with_rounded_biases
from deployment.predictions import Predictions, expect_same_top1, predictions
from deployment.runtime import load, session
from quantizers.protocol import Protocol
from tests.deployment.students import BLOCK, LAYER, SIZE, net, noise, student_of


def constants(model: Any) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def replaced(exported: Exported, name: str, value: np.ndarray) -> None:
    (tensor,) = [t for t in exported.model.graph.initializer if t.name == name]
    tensor.raw_data = value.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()


def scaled(name: str, factor: float) -> Callable[[Exported], None]:
    return lambda exported: replaced(exported, name, constants(exported.model)[name] * np.float32(factor))


def without_bias(layer: str) -> Callable[[Exported], None]:
    return lambda exported: replaced(
        exported, f"{layer}.bias_integers", 0 * constants(exported.model)[f"{layer}.bias_integers"]
    )


# mistake, the first tensor that it changes, its layer, and the layers whose inputs it changes as well
MISTAKES = {
    "bias of a layer dropped": (without_bias("a"), "relu", "a", []),
    "weight scales 5 % too large": (scaled("a.weight_scale", 1.05), "relu", "a", []),
    "weight scales 0.1 % too large": (scaled("a.weight_scale", 1.001), "relu", "a", []),
    "scale of a tensor 1 % too large": (scaled("relu_scale", 1.01), "relu", "a", ["b"]),
    "scale of the image 1 % too small": (scaled("x_scale", 0.99), "x", "", ["stem"]),
    "weight scales of the classifier 1 % too large": (scaled("fc.weight_scale", 1.01), "logits", "fc", []),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
@pytest.mark.parametrize("container", ["int8", "int4"])
def test_small_mistakes_are_found_and_named(mistake: str, bits: tuple[int, int], container: Any) -> None:
    student = student_of(net(), bits, protocol=LAYER, symmetric=True)
    exported = export_onnx(student, SIZE, container=container)
    expect_parity(compare(student, exported, [noise(40)]))
    make, tensor, layer, behind = MISTAKES[mistake]
    make(exported)
    found = compare(student, exported, [noise(40)])
    # what lies behind gets the runtime's own inputs, and agrees
    first, *others = [row for row in found.rows if row.fault]
    assert (first.tensor, first.layer) == (tensor, layer)
    assert [row.layer for row in others] == behind
    where = rf"\(layer {layer}\)" if layer else f"at {tensor}, the first tensor that differs"
    with pytest.raises(ParityError, match=where):
        expect_parity(found)


def test_a_bound_that_is_missing_is_found() -> None:
    student = student_of(net(), (4, 4))
    exported = export_onnx(student, SIZE, container="int8")
    replaced(exported, "relu_high", np.array(255))  # saturation of the type instead of the grid
    student.get_submodule("activation_sites.relu").quantizer.scale.mul_(0.5)
    replaced(exported, "relu_scale", constants(exported.model)["relu_scale"] * 0.5)
    with pytest.raises(ParityError, match=r"got them \d+ steps apart, where 1 is a tie, at relu \(layer a\)"):
        expect_parity(compare(student, exported, [noise(5)]))


def test_what_is_not_finite_is_no_agreement() -> None:
    student = student_of(net(), (8, 8))
    exported = export_onnx(student, SIZE)
    replaced(exported, "fc.bias", np.full(5, np.nan))
    with pytest.raises(
        ParityError, match=r"expected the logits \(layer fc\) of onnxruntime and student to be alike.* inf of"
    ):
        expect_parity(compare(student, exported, [noise(2)]))


def test_images_that_are_predicted_otherwise_are_counted() -> None:
    student = student_of(net(), (8, 8))
    exported = export_onnx(student, SIZE)
    replaced(exported, "fc.bias", constants(exported.model)["fc.bias"] + np.float32([0, 0, 9, 0, 0]))
    with torch.no_grad():
        others = int((student(noise(20)).argmax(1) != 2).sum())
    with pytest.raises(ParityError, match=rf"of their largest apart.*; {others} of 20 images are predicted otherwise"):
        expect_parity(compare(student, exported, [noise(20)]))


def test_all_batches_count_up_to_the_limit() -> None:
    student = student_of(net(), (4, 4))
    exported = export_onnx(student, SIZE, container="int8")
    images = noise(75)
    whole = compare(student, exported, images.split(30))
    assert (whole.images, whole.alike) == (75, 75)
    assert {row.elements / 75 for row in whole.rows if row.tensor in ("x", "logits")} == {3 * 8 * 8, 5}
    assert compare(student, exported, images.split(30), limit=40).images == 40
    assert compare(student, exported, [images], limit=1000).images == 75
    with pytest.raises(ValueError, match="at least one image to compare, got none"):
        compare(student, exported, [])


def test_a_mistake_in_the_last_batch_is_found() -> None:
    student = student_of(net(), (8, 8), symmetric=True)
    exported = export_onnx(student, SIZE)
    weight = constants(exported.model)["stem.weight_integers"].copy()
    weight[:, 1] //= 2
    replaced(exported, "stem.weight_integers", weight)
    images = noise(40)
    images[:-1, 1] = 0  # what the wrong weights are multiplied with
    expect_parity(compare(student, exported, images.split(15), limit=39))
    with pytest.raises(ParityError, match=r"at act \(layer stem\)"):
        expect_parity(compare(student, exported, images.split(15)))


BOUNDS = [
    ({"steps": 1.0, "share": 1e-3, "edge": 0.0019}, ""),
    ({"steps": 2.0}, "2 steps apart"),
    ({"steps": 1.0, "edge": 0.0021}, "0.0021 steps away from the edge"),
    ({"steps": 1.0, "share": 1.1e-3}, "apart in more elements than the 0.001"),
    ({"steps": 1.0, "share": 0.02, "elements": 100}, ""),  # two elements of a small tensor
    ({"steps": 1.0, "share": 0.03, "elements": 100}, "apart in more elements"),
    ({"steps": 1.0, "share": 3.9e-3, "edge": 0.0079, "leeway": 4.0}, ""),
    ({"steps": 1.0, "edge": 0.26, "leeway": 256.0}, "away from the edge"),
    ({"relative": 9e-6}, ""),
    ({"relative": 1.1e-5}, "1.1e-05 of their largest apart"),
    ({"relative": float("nan")}, "nan of their largest apart"),
]


@pytest.mark.parametrize(("found", "fault"), BOUNDS)
def test_every_bound(found: dict[str, Any], fault: str) -> None:
    row = replace(TensorParity(tensor="relu", layer="a", elements=10**6), **found)
    assert (fault in row.fault) if fault else row.fault == ""
    if not fault:
        expect_parity(Parity([row], 1, 1))


def test_equal_values_are_one_tie() -> None:
    """Of a plain background one value lies on an edge: half of the elements differ, and nothing is wrong."""
    student = student_of(net(), (8, 8))
    exported = export_onnx(student, SIZE, container="int8")
    grid = student.get_submodule("activation_sites.x").quantizer
    edge = float((100.5 - grid.zero_point) * grid.scale)
    images = noise(4)
    images[:, :, :4] = edge * (1 - 1e-6)
    moved = constants(exported.model)["x_scale"] * np.float32(1 - 3e-6)  # as another order of a sum would
    replaced(exported, "x_scale", moved)
    row = compare(student, exported, [images]).rows[0]
    assert (row.tensor, row.steps, round(row.share * row.elements)) == ("x", 1, 1)
    assert row.fault == ""


def test_one_value_that_is_no_tie_is_found() -> None:
    """However few elements differ, each lies on an edge."""
    student = student_of(net(), (8, 8))
    exported = export_onnx(student, SIZE, container="int8")
    grid = student.get_submodule("activation_sites.x").quantizer
    images = float((200.4 - grid.zero_point) * grid.scale) * torch.ones(4, *SIZE)  # a tenth of a step below the edge
    beyond = np.float32((200.4 - float(grid.zero_point)) / (200.6 - float(grid.zero_point)))
    replaced(exported, "x_scale", constants(exported.model)["x_scale"] * beyond)
    row = compare(student, exported, [images]).rows[0]
    assert (row.tensor, row.steps, round(row.share * row.elements)) == ("x", 1, 1)
    assert row.edge == pytest.approx(0.1, abs=1e-3)
    assert "0.1 steps away from the edge between two, where 0.002 is a tie" in row.fault


def test_layers_of_tensors() -> None:
    student = student_of(net(), (8, 8))
    origins = origins_of(student)
    assert origins["logits"] == ("fc", 1)
    assert origins["activation_sites.x"] == ("", 0)
    assert origins["activation_sites.relu"] == ("a", 1)
    assert origins["activation_sites.relu_1"] == ("b", 1)  # x + b(...): the sum with a quantized tensor
    only_weights = student_of(net(), (8, 32))
    assert origins_of(only_weights) == {"logits": ("fc", 5)}


def test_predictions_are_counted() -> None:
    student = student_of(net(), (4, 4), symmetric=True)
    exported = export_onnx(student, SIZE)
    images = noise(60)
    with torch.no_grad():
        labels = student(images).argmax(1)
    labels[:15] = (labels[:15] + 1) % 5
    found = predictions(student, exported, [(images[:40], labels[:40]), (images[40:], labels[40:])])["onnxruntime"]
    assert found.images == 60
    assert found.student_top1 == pytest.approx(75)
    assert found.agreement >= 98
    with pytest.raises(ValueError, match="at least one labelled image"):
        predictions(student, exported, [])


@pytest.mark.parametrize(("top1", "tolerance", "same"), [(80.2, 0.2, True), (79.7, 0.2, False), (10.0, None, True)])
def test_top1_fails_where_a_tolerance_is_given(top1: float, tolerance: float | None, same: bool) -> None:
    found = Predictions(images=100, top1=top1, student_top1=0.0, rounded_top1=80.0, agreement=96.0)
    if same:
        expect_same_top1(found, tolerance)
    else:
        with pytest.raises(ParityError, match=r"on 100 images, 80\.00, within 0\.2 points, got 79\.70"):
            expect_same_top1(found, tolerance)


POWERS = Protocol(
    name="mine", placement="operands", first_weight=8, last_weight=8, last_input=8, image=8, operand=8,
    symmetric_weights=True, power_of_two=True,
)  # fmt: skip


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("container", ["int8", "int4", "auto"])
def test_with_scales_of_powers_of_two_all_is_equal_bitwise(bits: tuple[int, int], container: Any) -> None:
    """No sum is rounded then, in whatever order: that any bit differs elsewhere is rounding, and nothing else."""
    student = student_of(net(), bits, protocol=POWERS)
    exported = export_onnx(student, SIZE, container=container)
    assert exported.float_biases == {}
    images = noise(64)
    found = compare(student, exported, [images])
    expect_parity(found)
    assert {(row.steps, row.share, row.edge, row.relative) for row in found.rows} == {(0, 0, 0, 0)}
    assert found.alike == 64
    (theirs,) = session(exported.model.SerializeToString()).run(None, {"images": images.numpy()})
    with torch.no_grad():
        ours = with_rounded_biases(student, exported)(images)
    assert np.array_equal(theirs, ours.numpy())


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_a_convolution_in_integers_by_hand_is_the_runtimes(bits: tuple[int, int]) -> None:
    """`q_y = clip(round(M (sum q_w (q_x - z_x) + b)) + z_y)`, sums in int64, only M = s_w s_x / s_y a fraction."""
    student = student_of(net(), bits, protocol=LAYER, symmetric=True)
    exported = export_onnx(student, SIZE, container="int8")
    names = [exported.sites[f"activation_sites.{tensor}"] for tensor in ("pool", "relu")]
    probed = onnx.ModelProto()
    probed.CopyFrom(exported.model)
    for name in names:
        probed.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    q_x, q_y = session(probed.SerializeToString()).run(names, {"images": noise(3).numpy()})
    c = constants(exported.model)
    x = q_x.astype(np.int64) - int(c["pool_zero_point"])
    w, bias = c["a.weight_integers"].astype(np.int64), c["a.bias_integers"].astype(np.int64)
    n, channels, height, width = x.shape
    padded = np.zeros((n, channels, height + 2, width + 2), np.int64)
    padded[:, :, 1:-1, 1:-1] = x
    total = np.zeros((n, len(w), height, width), np.int64) + bias[None, :, None, None]
    for i in range(3):
        for j in range(3):
            total += np.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], w[:, :, i, j])
    factor = c["a.weight_scale"].astype(np.float32) * c["pool_scale"] / c["relu_scale"]
    y = np.rint(total.astype(np.float32) * factor[None, :, None, None]).astype(np.int64) + int(c["relu_zero_point"])
    assert np.array_equal(np.clip(y, 0, 2 ** bits[1] - 1), q_y)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("container", ["int8", "int4"])
@pytest.mark.parametrize("protocol", [BLOCK, LAYER, POWERS])
def test_openvino_computes_the_same(bits: tuple[int, int], container: Any, protocol: Protocol) -> None:
    student = student_of(net(), bits, protocol=protocol, symmetric=True)
    exported = export_onnx(student, SIZE, container=container)
    found = compare(student, exported, [noise(40)], runtime="openvino")
    expect_parity(found)
    assert found.runtime == "openvino"
    assert found.alike == 40
    labels = torch.zeros(40, dtype=torch.long)
    scores = predictions(student, exported, [(noise(40), labels)], runtimes=["onnxruntime", "openvino"])
    assert list(scores) == ["onnxruntime", "openvino"]
    assert {own.agreement for own in scores.values()} == {100}


def test_a_mistake_is_found_in_openvino_and_named_so() -> None:
    student = student_of(net(), (8, 8), protocol=LAYER, symmetric=True)
    exported = export_onnx(student, SIZE, container="int8")
    without_bias("a")(exported)
    with pytest.raises(ParityError, match=r"same integers from openvino and student .* at relu \(layer a\)"):
        expect_parity(compare(student, exported, [noise(40)], runtime="openvino"))


def test_openvino_leaves_float_inputs_of_integer_layers_float() -> None:
    """Left to itself it quantizes them, where there are some dozens."""
    network = nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 40))
    student = student_of(network, (8, 8), protocol=BLOCK, symmetric=True)
    found = compare(student, export_onnx(student, SIZE, container="int8"), [noise(40)], runtime="openvino")
    expect_parity(found)


def test_a_tensor_of_another_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty(OpenVINOModel):
        def run(self, *arguments: Any) -> list[Any]:
            return [found[:0] for found in super().run(*arguments)]

    monkeypatch.setattr("deployment.runtime.OpenVINOModel", Empty)
    student = student_of(net(), (8, 8), protocol=LAYER, symmetric=True)
    with pytest.raises(ParityError, match=r"got \(0, 3, 8, 8\), at x .*the first tensor that differs"):
        compare(student, export_onnx(student, SIZE, container="int8"), [noise(4)], runtime="openvino")


def test_what_openvino_does_not_read_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"openvino: expected a model that OpenVINO reads.*choose another"):
        load(b"no model", "openvino")
