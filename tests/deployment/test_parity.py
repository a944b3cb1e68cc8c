"""A disagreement is found, named by its first tensor, and fails; integer arithmetic by hand agrees with the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from deployment.onnx_export import Exported, export_onnx
from deployment.parity import ParityError, Predictions, compare, expect_parity, expect_same_top1, predictions
from deployment.runtime import session
from tests.deployment.students import LAYER, SIZE, net, noise, student_of


def constants(model: Any) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def replaced(exported: Exported, name: str, value: np.ndarray) -> None:
    (tensor,) = [t for t in exported.model.graph.initializer if t.name == name]
    tensor.raw_data = value.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes()


def test_a_wrong_scale_is_found_at_the_first_tensor_that_it_changes() -> None:
    student = student_of(net(), (4, 4))
    exported = export_onnx(student, SIZE, container="int8")
    expect_parity(compare(student, exported, noise(5)))
    replaced(exported, "a.weight_scale", 2 * constants(exported.model)["a.weight_scale"])
    rows = compare(student, exported, noise(5))
    with pytest.raises(ParityError, match=r"at relu, the first tensor that differs"):
        expect_parity(rows)
    # what lies behind gets the runtime's own inputs, and agrees
    assert [row.tensor for row in rows if row.steps > 1] == ["relu"]


def test_a_bound_that_is_missing_is_found() -> None:
    student = student_of(net(), (4, 4))
    exported = export_onnx(student, SIZE, container="int8")
    replaced(exported, "relu_high", np.array(255))  # saturation of the type instead of the grid
    student.get_submodule("activation_sites.relu").quantizer.scale.mul_(0.5)
    replaced(exported, "relu_scale", constants(exported.model)["relu_scale"] * 0.5)
    with pytest.raises(ParityError, match="at relu"):
        expect_parity(compare(student, exported, noise(5)))


def test_what_is_not_finite_is_no_agreement() -> None:
    student = student_of(net(), (8, 8))
    exported = export_onnx(student, SIZE)
    replaced(exported, "fc.bias", np.full(5, np.nan))
    with pytest.raises(ParityError, match="at logits"):
        expect_parity(compare(student, exported, noise(2)))


def test_predictions_are_counted() -> None:
    student = student_of(net(), (4, 4), symmetric=True)
    exported = export_onnx(student, SIZE)
    images = noise(60)
    with torch.no_grad():
        labels = student(images).argmax(1)
    labels[:15] = (labels[:15] + 1) % 5
    found = predictions(student, exported, [(images[:40], labels[:40]), (images[40:], labels[40:])])
    assert found.images == 60
    assert found.student_top1 == pytest.approx(75)
    assert found.agreement >= 98
    expect_same_top1(found, 0.0)
    replaced(exported, "fc.bias", constants(exported.model)["fc.bias"] + np.array([0, 0, 9, 0, 0]))
    with pytest.raises(ParityError, match=r"expected the student's top-1 on 60 images, 75\.00"):
        expect_same_top1(predictions(student, exported, [(images, labels)]), 0.1)
    with pytest.raises(ValueError, match="at least one labelled image"):
        predictions(student, exported, [])


@pytest.mark.parametrize(
    ("top1", "agreement", "same"),
    [
        (80.0, 100.0, True),
        (80.2, 99.8, True),
        (82.0, 96.0, True),
        (84.0, 96.0, True),
        (87.0, 93.0, True),
        (87.0, 99.0, False),
    ],
)
def test_more_than_chance_does_is_a_difference(top1: float, agreement: float, same: bool) -> None:
    found = Predictions(images=100, top1=top1, student_top1=0.0, rounded_top1=80.0, agreement=agreement)
    if same:
        expect_same_top1(found, 0.1)
    else:
        with pytest.raises(ParityError, match=r"within 0\.1 points, got 87\.00"):
            expect_same_top1(found, 0.1)


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
