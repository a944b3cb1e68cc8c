"""Exported students compute in onnxruntime what they compute here, and the file holds the integers it should."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from deployment.onnx_export import export_onnx
from deployment.packages import require
from deployment.parity import compare, expect_parity, with_rounded_biases
from deployment.runtime import session
from quantizers.adaround import AdaRound
from quantizers.layer import ActivationSite, float_mode, quantized_layers
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax
from tests.deployment.students import BLOCK, LAYER, SIZE, net, noise, student_of


def run(model: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(session(model.SerializeToString()).run(None, {"images": images.numpy()})[0])


def kinds(model: Any) -> dict[str, str]:
    return {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}


def fused(model: Any, folder: Path) -> Counter[str]:
    """The operators that onnxruntime makes of a model."""
    session(model.SerializeToString(), optimized=folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (2, 2), (2, 4), (2, 8), (3, 5), (8, 32), (32, 8), (6, 12)])
@pytest.mark.parametrize("container", ["int8", "int4", "int2", "auto"])
@pytest.mark.parametrize("protocol", [BLOCK, LAYER])
def test_every_tensor_is_within_a_step(
    container: Any, bits: tuple[int, int], symmetric: bool, protocol: Protocol
) -> None:
    student = student_of(net(), bits, protocol=protocol, symmetric=symmetric)
    found = compare(student, export_onnx(student, SIZE, container=container), [noise(7)])
    expect_parity(found)
    rows = found.rows
    assert len(rows) == 1 + sum(isinstance(m, ActivationSite) for m in student.modules())


def test_a_float_student_is_the_teacher_for_any_batch() -> None:
    network = net()
    student = student_of(network)
    with float_mode(student):
        model = export_onnx(student, SIZE).model
    assert not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    for batch in (1, 5):
        images = noise(batch)
        with torch.no_grad():
            torch.testing.assert_close(run(model, images), network(images), rtol=1e-4, atol=1e-5)


def test_containers_hold_what_they_say() -> None:
    student = student_of(net(), (4, 4))
    found = {container: export_onnx(student, SIZE, container=container) for container in ("int8", "int4", "auto")}
    types = {container: kinds(exported.model) for container, exported in found.items()}
    assert types["int4"]["a.weight_integers"] in ("INT4", "UINT4")
    assert types["int4"]["relu_zero_point"] == "UINT4"
    assert types["int4"]["stem.weight_integers"] in ("INT8", "UINT8")  # the ends have 8 bits
    assert types["int8"]["a.weight_integers"] == types["auto"]["a.weight_integers"] == "INT8"
    assert types["int8"]["b.weight_integers"] == "INT8"
    assert types["auto"]["b.weight_integers"] == types["int4"]["b.weight_integers"]  # its output is float
    assert found["int4"].weight_bytes < found["auto"].weight_bytes < found["int8"].weight_bytes
    assert {t for name, t in types["int8"].items() if name.endswith("bias_integers")} == {"INT32"}


def test_two_bits_are_stored_in_two_bits_in_opset_25() -> None:
    model = export_onnx(student_of(net(), (2, 2), symmetric=True), SIZE, container="int2").model
    assert model.opset_import[0].version == 25
    assert kinds(model)["a.weight_integers"] == "INT2"
    with pytest.raises(ValueError, match=r"export\.opset: expected at least 25 for container int2, got 21"):
        export_onnx(student_of(net(), (2, 2)), SIZE, container="int2", opset=21)


def test_stored_integers_are_the_students() -> None:
    student = student_of(net(), (4, 4), symmetric=True)
    model = export_onnx(student, SIZE, container="int4").model
    found = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for path, layer in quantized_layers(student):
        q, scale, _ = layer.weight_quantizer.integers(layer.weight)
        assert np.array_equal(found[f"{path}.weight_integers"].astype(int), q.numpy())
        assert np.array_equal(found[f"{path}.weight_scale"], scale.flatten().numpy())


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)])
def test_integer_kernels_run_in_the_int8_container(bits: tuple[int, int], tmp_path: Path) -> None:
    student = student_of(net(), bits, symmetric=True)
    operators = fused(export_onnx(student, SIZE, container="int8").model, tmp_path)
    assert operators["QLinearConv"] == 2  # the stem, with its ReLU6, and a; the others give floats to a sum
    if bits[1] == 4:
        assert operators["Min"] >= 2


def test_a_clip_is_done_by_the_ends_of_the_integers() -> None:
    student = student_of(net(), (8, 8))
    with torch.no_grad():
        student.get_submodule("activation_sites.act").quantizer.scale.fill_(0.05)  # 255 steps reach to 12.75
        student.stem.layer.bias += 5
    exported = export_onnx(student, SIZE, container="int8")
    operators = Counter(node.op_type for node in exported.model.graph.node)
    assert operators["Clip"] == operators["Relu"] == 0
    assert operators["Min"] == 1  # 6 is 120 steps
    expect_parity(compare(student, exported, [noise(4)]))


def test_a_bias_of_integers_is_a_multiple_of_weight_times_input() -> None:
    student = student_of(net(), (3, 3), symmetric=True)
    exported = export_onnx(student, SIZE)
    assert set(exported.biases) == {"stem", "a"}  # the classifier reads a float mean
    rounded = with_rounded_biases(student, exported)
    for path, bias in exported.biases.items():
        own = student.get_submodule(path)
        site = {"stem": "x", "a": "act"}.get(path)
        step = own.weight_quantizer.scale.flatten() * student.get_submodule(f"activation_sites.{site}").quantizer.scale
        assert ((bias / step) - (bias / step).round()).abs().max() < 1e-3
        assert ((bias - own.bias).abs() <= 0.5001 * step).all()
        assert torch.equal(rounded.get_submodule(path).bias, bias)
    assert exported.float_biases["b"] == "the output is not quantized"


class Moved(nn.Module):
    """A layer with a large bias, what a runtime may move a QuantizeLinear across, another layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(3, 8, 3, padding=1), function
        nn.init.normal_(self.first.bias)
        self.last = nn.Linear(self.rest(torch.zeros(2, *SIZE)).shape[-1], 4)

    def rest(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rest(x)).flatten(1)


@pytest.mark.parametrize("bits", [(2, 8), (4, 4)])
@pytest.mark.parametrize("container", ["int8", "int4"])
@pytest.mark.parametrize(
    "function",
    [
        nn.MaxPool2d(2),
        nn.Sequential(nn.ReLU6(), nn.MaxPool2d(2)),
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: F.relu6(x).permute(0, 2, 3, 1),
        lambda x: x.view(x.size(0), 2, 4, 64).transpose(1, 2).contiguous(),
        lambda x: x.unsqueeze(1)[:, :, 1:],
    ],
    ids=["pool", "clip and pool", "tokens", "clip and permute", "shuffle", "slice"],
)
def test_a_bias_is_rounded_where_the_runtime_reaches_it(bits: tuple[int, int], container: Any, function: Any) -> None:
    """onnxruntime quantizes the bias of a layer by itself where it can move a QuantizeLinear up to the layer."""
    torch.manual_seed(0)
    student = student_of(Moved(function), bits, protocol=LAYER, symmetric=True)
    exported = export_onnx(student, SIZE, container=container)
    assert "first" in exported.biases
    expect_parity(compare(student, exported, [noise(32)]))


def test_a_bias_too_large_for_32_bits_stays_float() -> None:
    student = student_of(net(), (8, 8), symmetric=True)
    with torch.no_grad():
        student.a.weight_quantizer.scale[0] = 1e-9
    exported = export_onnx(student, SIZE)
    assert "32 bits" in exported.float_biases["a"]
    expect_parity(compare(student, exported, [noise(3)]))


def test_metadata() -> None:
    model = export_onnx(student_of(net()), SIZE, facts={"protocol": "brecq"}).model
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["protocol"] == "brecq"
    assert props["container"] == "auto"
    assert props["calibrant"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_roundings_that_are_not_final_are_refused() -> None:
    student = student_of(net(), weight=partial(AdaRound, range=MinMax()))
    with pytest.raises(ValueError, match=r"roundings of layer stem are not final"):
        export_onnx(student, SIZE)


def test_a_dead_channel_and_a_tensor_without_range_are_written() -> None:
    network = net()
    with torch.no_grad():
        network.a.weight[3] = 0
    student = student_of(network, (2, 2))
    student.get_submodule("activation_sites.relu").enabled = False
    found = compare(student, export_onnx(student, SIZE), [noise(3)])
    expect_parity(found)
    assert "relu" not in [row.tensor for row in found.rows]


class Operator(nn.Module):
    """A layer, what is tested, a layer where that gives maps."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x)).flatten(1)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([b, a * 2.0, torch.split(x, [3, 5], 1)[1]], 1)


OPERATORS = {
    "sigmoid": torch.sigmoid, "silu": nn.SiLU(), "gelu": nn.GELU(), "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(), "leaky": nn.LeakyReLU(0.2), "elu": nn.ELU(), "mish": nn.Mish(), "tanh": nn.Tanh(),
    "hardtanh": nn.Hardtanh(-0.5, 0.7), "clamp": lambda x: x.clamp(min=-0.1), "softmax": nn.Softmax(1),
    "shuffle": Shuffle(), "halves": Halves(), "permute": lambda x: x.permute(0, 2, 3, 1), "sum": lambda x: 1 - x / 2,
    "pool": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "uncounted": nn.AvgPool2d(3, 2, 1, count_include_pad=False), "max": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "adaptive": nn.AdaptiveAvgPool2d(2), "mean": lambda x: x.mean([2, 3], keepdim=True),
    "mean of rows": lambda x: x.mean(3), "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "slice": lambda x: x[:, 1:-1, ::2, -3:], "pick": lambda x: x[:, -1].unsqueeze(1), "ellipsis": lambda x: x[..., 2],
    "transposed": nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1, groups=2),
    "same": nn.Conv2d(8, 4, 4, padding="same"), "layer norm": nn.LayerNorm(8),
    "batch norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_operators(name: str, quantized: bool) -> None:
    torch.manual_seed(0)
    network = Operator(OPERATORS[name])
    student = student_of(network, (8, 8), protocol=LAYER)
    if not quantized:
        with float_mode(student):
            model = export_onnx(student, SIZE).model
        with torch.no_grad():
            torch.testing.assert_close(run(model, noise(4)), network(noise(4)), rtol=1e-4, atol=1e-5)
    else:
        expect_parity(compare(student, export_onnx(student, SIZE), [noise(4)]))


class Tokens(nn.Module):
    """A linear layer on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.stem(x).flatten(2).transpose(1, 2)).mean(1)


def test_a_linear_layer_on_tokens() -> None:
    torch.manual_seed(0)
    student = student_of(Tokens(), (4, 8), protocol=LAYER)
    expect_parity(compare(student, export_onnx(student, SIZE), [noise(4)]))


def test_what_cannot_be_written_is_named() -> None:
    with pytest.raises(ValueError, match=r"no ONNX for .*\(cumsum, an operator\)"):
        export_onnx(student_of(Operator(lambda x: x.cumsum(1))), SIZE)
    with pytest.raises(ValueError, match=r"export\.container: expected one of auto, int8, int4, int2, got 'int5'"):
        export_onnx(student_of(net()), SIZE, container="int5")  # type: ignore[arg-type]


def test_an_onnx_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 24)
    with pytest.raises(ValueError, match=r"export\.opset: expected at most 24, .* got 25.*pip install --upgrade onnx"):
        export_onnx(student_of(net()), SIZE, container="int2")


def test_a_missing_package_is_named_with_its_remedy() -> None:
    with pytest.raises(ValueError, match=r"no_such_package.*pip install calibrant\[export\]"):
        require("no_such_package")


def test_two_outputs_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), x

    student = student_of(Two())
    assert isinstance(student, fx.GraphModule)
    with pytest.raises(ValueError, match="returns one tensor"):
        export_onnx(student, SIZE)
