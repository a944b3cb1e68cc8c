"""Which tensors and weights each protocol quantizes, at which width, signed or not: exact lists."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from quantizers.convert import BitWidths, Conversion, convert
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax

WEIGHT = partial(Nearest, range=MinMax())
ACTIVATION = partial(NearestActivation, range=MinMax())
CONF = Path(__file__).parents[2] / "conf" / "protocol"


def converted(network: nn.Module, protocol: str, bits: tuple[int, int] = (4, 3), side: int = 64) -> Conversion:
    chosen = instantiate(OmegaConf.load(CONF / f"{protocol}.yaml"))
    return convert(network, torch.zeros(1, 3, side, side), chosen, WEIGHT, ACTIVATION, BitWidths(*bits))


def tensors(conversion: Conversion) -> dict[str, int]:
    return {r.name: r.bits for r in conversion.report if r.kind == "activation"}


def weights(conversion: Conversion) -> dict[str, int]:
    return {r.name: r.bits for r in conversion.report if r.kind == "weight"}


BLOCKS = [f"layer{stage}_{block}_relu" for stage in range(1, 5) for block in range(2)]
RELUS = ["relu", *(name for block in BLOCKS for name in (block, f"{block}_1"))]
SUMMED = [f"{block}_conv2" for block in (f"layer{s}_{b}" for s in range(1, 5) for b in range(2))]
SUMMED += [f"layer{stage}_0_downsample_0" for stage in (2, 3, 4)]


@pytest.mark.parametrize(
    ("protocol", "ends", "expected"),
    [
        ("brecq", 8, dict.fromkeys(RELUS, 3) | {"relu": 8, RELUS[-1]: 8}),
        ("qdrop", 8, dict.fromkeys(RELUS, 3) | {RELUS[-1]: 8}),
        ("zeroq", 4, dict.fromkeys(RELUS, 3)),
        # the pooled tensors stand for the ReLU before them, the image is quantized
        ("all_layers", 4, {"x": 8, "maxpool": 3} | dict.fromkeys(RELUS[1:-1], 3) | {"flatten": 3}),
        # both sides of every sum, and of the mean before the classifier
        (
            "onnxruntime",
            8,
            {"x": 8} | dict.fromkeys(RELUS, 3) | dict.fromkeys(SUMMED, 8) | {RELUS[-1]: 8, "avgpool": 8},
        ),
    ],
)
def test_resnet18(protocol: str, ends: int, expected: dict[str, int]) -> None:
    network = torchvision.models.resnet18(weights=None)
    conversion = converted(network, protocol)
    assert tensors(conversion) == expected
    layers = [path for path, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert weights(conversion) == dict.fromkeys(layers, 4) | {"conv1": ends, "fc": ends}
    rows = [r for r in conversion.report if r.kind == "activation"]
    assert all(
        r.signed == (r.name in ("x", *SUMMED)) for r in rows
    )  # all others come from ReLUs, through pooling or not
    assert all(r.per_channel for r in conversion.report if r.kind == "weight")
    scopes = {r.name: r.scope for r in rows}
    if protocol != "all_layers":
        assert scopes["layer2_1_relu_1"] == "layer2.1.relu"


def test_mobilenet_v2_quantizes_bottlenecks_where_layers_read_them() -> None:
    network = torchvision.models.mobilenet_v2(weights=None)
    conversion = converted(network, "qdrop")
    rows = {r.name: r for r in conversion.report if r.kind == "activation"}
    # block 1 gives a convolution's result to block 2 alone: that is quantized, and signed
    assert rows["features_1_conv_1"].signed
    # block 2's projection is read by block 3's expansion and by block 3's sum; block 3's own only by the sum
    assert rows["features_2_conv_2"].signed
    assert "features_3_conv_2" not in rows
    assert rows["add"].signed
    assert not rows["features_0_2"].signed
    assert rows["features_18_2"].bits == 8
    reference = conversion.reference
    called = [(n.name, reference.get_submodule(str(n.target))) for n in reference.graph.nodes if n.op == "call_module"]
    assert set(tensors(converted(network, "zeroq"))) == {
        name for name, module in called if isinstance(module, nn.ReLU6)
    }


def test_operands_of_mobilenet_v2_are_quantized_and_clips_are_not_twice() -> None:
    conversion = converted(torchvision.models.mobilenet_v2(weights=None), "onnxruntime")
    found = tensors(conversion)
    assert found["features_3_conv_2"] == 8  # read by a sum only
    assert found["features_2_conv_2"] == 3  # read by a layer, too
    assert found["features_18_2"] == found["adaptive_avg_pool2d"] == 8
    # the convolution in front of a ReLU6 is not quantized by itself
    assert not {"features_0_0", "features_1_conv_0_0"} & set(found)
    assert all(r.symmetric for r in conversion.report if r.kind == "weight")


def test_operands_behind_what_only_rearranges() -> None:
    class Rearranged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.max_pool2d(self.a(x), 2)
            padded = nn.functional.pad(x[:, :, ::2], (1, 1))
            return self.b(torch.sigmoid(padded) * self.scale) + nn.functional.pad(padded, (1, 1), value=1.0)[..., 1:-1]

    # `a` stands for all that is cut from it; the constant is no activation; padding with ones is an operator
    assert tensors(converted(Rearranged(), "onnxruntime")) == {
        "x": 8,
        "a": 8,
        "sigmoid": 8,
        "mul": 8,
        "b": 8,
        "pad_1": 8,
    }


def test_squeezenet_quantizes_concatenations_once() -> None:
    conversion = converted(torchvision.models.squeezenet1_1(weights=None), "qdrop")
    found = tensors(conversion)
    squeezes = [f"features_{i}_squeeze_activation" for i in (3, 4, 6, 7, 9, 10, 11, 12)]
    cats = ["cat", *(f"cat_{i}" for i in range(1, 8))]
    assert set(found) == {"features_1", *squeezes, *cats}
    assert found["cat_7"] == 8  # through dropout to the last convolution
    assert not any(r.signed for r in conversion.report if r.kind == "activation")
    assert weights(conversion)["classifier.1"] == 8


def test_squeeze_and_excitation() -> None:
    conversion = converted(torchvision.models.efficientnet_b0(weights=None), "qdrop")
    rows = {r.name: r for r in conversion.report if r.kind == "activation"}
    nodes = {n.name: n for n in conversion.reference.graph.nodes}
    assert rows["features_1_0_block_0_2"].signed  # SiLU goes below zero
    assert "features_1_0_block_1_avgpool" not in rows  # the pooled tensor stands for the SiLU before it
    assert rows["features_1_0_block_1_activation"].signed
    assert "features_1_0_block_1_scale_activation" not in rows  # the gate is read by a product only
    assert rows["mul"].signed
    assert nodes["mul"].meta["scope"] == "features.1.0.block.1"


def test_densenet_reads_activations() -> None:
    found = tensors(converted(torchvision.models.densenet121(weights=None), "qdrop", side=32))
    assert not [name for name in found if name.startswith("cat") or "norm" in name]
    assert len(found) == 120


class Signs(nn.Module):
    """Tensors whose sign follows from the operators, each read by its own layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.layers = nn.ModuleList(nn.Conv2d(c, 4, 1) for c in (4, 4, 8, 8, 4, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        positive, signed = torch.relu(x), nn.functional.gelu(x)
        parts = [
            positive + nn.functional.relu6(x),
            positive + signed,
            torch.cat([positive, torch.sigmoid(x)], 1),
            torch.cat([positive, signed], 1),
            positive * nn.functional.hardsigmoid(x),
            x.clamp(min=0.0, max=4.0) * 2,
            nn.functional.hardtanh(x),
            positive - 1,
        ]
        return torch.stack([layer(part) for layer, part in zip(self.layers, parts, strict=True)]).sum(0)


def test_signs_follow_from_operators() -> None:
    torch.manual_seed(0)
    conversion = converted(Signs(), "qdrop")
    assert {r.name: r.signed for r in conversion.report if r.kind == "activation"} == {
        "add": False,
        "add_1": True,
        "cat": False,
        "cat_1": True,
        "mul": False,
        "mul_1": False,
        "hardtanh": True,
        "sub": True,
    }


class Swish(nn.Module):
    """x * sigmoid(x), written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x * torch.sigmoid(x))


def test_written_out_swish_is_an_activation() -> None:
    assert tensors(converted(Swish(), "zeroq")) == {"mul": 3}


def test_first_layers_in_parallel() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.d(torch.relu(self.c(torch.relu(self.a(x) + self.b(x)))))

    conversion = converted(Parallel(), "brecq")
    assert weights(conversion) == {"a": 8, "b": 8, "c": 4, "d": 8}
    assert tensors(conversion) == {"relu": 8, "relu_1": 8}
    assert tensors(converted(Parallel(), "all_layers")) == {"x": 8, "relu": 3, "relu_1": 3}


def test_unknown_placement_and_width_are_explained() -> None:
    with pytest.raises(ValueError, match=r"protocol.placement: expected one of relu, .*'everywhere'"):
        Protocol(name="mine", placement="everywhere")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"protocol.first_weight: .*got 1"):
        Protocol(name="mine", placement="relu", first_weight=1)
