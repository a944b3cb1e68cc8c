"""Conversion: what the student shares, keeps, quantizes and leaves in float; the teacher is never changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from quantizers.convert import SITES, BitWidths, Conversion, convert
from quantizers.layer import ActivationSite, QuantizedLayer, float_mode, quantized_layers, sites
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax
from quantizers.report import weight_bytes

WEIGHT = partial(Nearest, range=MinMax())
ACTIVATION = partial(NearestActivation, range=MinMax())
QDROP = Protocol(name="qdrop", placement="block_output", first_weight=8, last_weight=8, last_input=8)
W4A4 = BitWidths(4, 4)
CONF = Path(__file__).parents[2] / "conf"


class Small(nn.Module):
    """Two convolutions, a shared one, a residual sum in place, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        y = self.act(self.shared(x))
        y = self.shared(y)
        y += x
        return self.fc(self.act(y).mean((2, 3)))


def small(bits: BitWidths = W4A4, **kwargs: object) -> tuple[nn.Module, Conversion]:
    torch.manual_seed(0)
    network = Small().eval()
    protocol = kwargs.pop("protocol", QDROP)
    return network, convert(network, torch.zeros(1, 3, 8, 8), protocol, WEIGHT, ACTIVATION, bits, **kwargs)  # type: ignore[arg-type]


def test_teacher_is_left_alone() -> None:
    torch.manual_seed(0)
    network = Small().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    converted = convert(network, torch.zeros(1, 3, 8, 8), QDROP, WEIGHT, ACTIVATION, BitWidths(4, 4))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert network.act.inplace is True
    assert all(p.requires_grad for p in network.parameters())
    own = {p.data_ptr() for p in network.parameters()}
    for graph in (converted.student, converted.reference):
        assert not own & {p.data_ptr() for p in graph.parameters()}
    assert not {p.data_ptr() for p in converted.student.parameters()} & {
        p.data_ptr() for p in converted.reference.parameters()
    }


def test_shared_layer_has_one_quantizer() -> None:
    network, converted = small()
    assert [path for path, _ in quantized_layers(converted.student)] == ["stem", "shared", "fc"]
    calls = [n for n in converted.student.graph.nodes if n.target == "shared"]
    assert len(calls) == 2
    assert [r.name for r in converted.report if r.kind == "weight"] == ["stem", "shared", "fc"]
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), float_mode(converted.student):
        torch.testing.assert_close(converted.student(images), network(images))


def test_nodes_keep_their_names_and_sites_name_their_tensor() -> None:
    _, converted = small()
    reference = [n.name for n in converted.reference.graph.nodes]
    added = {n.name: n for n in converted.student.graph.nodes if n.name not in reference}
    assert [n.name for n in converted.student.graph.nodes if n.name not in added] == reference
    for node in added.values():
        assert node.meta["tensor"] in reference
        assert node.target == f"{SITES}.{node.meta['tensor']}"
        assert node.args[0].name == node.meta["tensor"]
        assert [u.name for u in node.args[0].users] == [node.name]  # nobody reads the float tensor


def test_float_mode_restores_switches_after_an_error() -> None:
    _, converted = small()
    first = next(sites(converted.student))[1]
    first.enabled = False
    enabled: list[bool] = []

    def interrupted() -> None:
        with float_mode(converted.student):
            enabled.extend(layer.enabled for _, layer in quantized_layers(converted.student))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert enabled == [False] * 3
    assert not first.enabled
    assert all(layer.enabled for _, layer in quantized_layers(converted.student))


def test_weights_are_quantized_per_channel_and_the_bias_is_not() -> None:
    _, converted = small()
    layer = converted.student.get_submodule("shared")
    assert isinstance(layer, QuantizedLayer)
    weight = layer.quantized_weight()
    assert all(len(channel.unique()) <= 16 for channel in weight)
    assert torch.equal(layer.bias, converted.reference.get_submodule("shared").bias)  # type: ignore[arg-type]
    x = torch.randn(1, 8, 5, 5)
    expected = torch.nn.functional.conv2d(x, weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=groups, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )
    network[2].running_mean.normal_()  # type: ignore[operator, union-attr]
    network[2].running_var.uniform_(0.5, 2.0)  # type: ignore[operator, union-attr]
    network.eval()
    images = torch.randn(2, 3, 5, 5)
    converted = convert(network, images, QDROP, WEIGHT, ACTIVATION, BitWidths(4, 8))
    with torch.no_grad(), float_mode(converted.student):
        torch.testing.assert_close(converted.student(images), network(images))
    layer = converted.student.get_submodule("1")
    assert isinstance(layer, QuantizedLayer)
    assert layer.weight_quantizer.scale.numel() == 6
    # nearest rounding moves a weight by half a step of its own output channel at most
    error = (layer.quantized_weight() - layer.weight).abs()  # (4, 6 / groups, 3, 3)
    scales = layer.weight_quantizer.scale.flatten().view(groups, 6 // groups)
    for group in range(groups):
        part = error[group * 4 // groups : (group + 1) * 4 // groups]
        assert bool((part.amax((0, 2, 3)) <= 0.5001 * scales[group]).all())


def test_32_bits_leave_a_side_float() -> None:
    network, converted = small(BitWidths(32, 4))
    assert not list(quantized_layers(converted.student))
    assert list(sites(converted.student))
    network, converted = small(BitWidths(4, 32))
    assert not list(sites(converted.student))
    network, converted = small(BitWidths(32, 32))
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(converted.student(images), network(images))


def test_allocation_sets_widths_and_rejects_unknown_layers() -> None:
    plain = Protocol(name="plain", placement="block_output")
    _, converted = small(protocol=plain, allocation={"shared": (3, 6)})
    weights = {r.name: r.bits for r in converted.report if r.kind == "weight"}
    tensors = {r.name: r.bits for r in converted.report if r.kind == "activation"}
    assert weights == {"stem": 4, "shared": 3, "fc": 4}
    assert tensors == {"act": 6, "act_1": 6, "act_2": 4}
    with pytest.raises(ValueError, match=r"allocation.*'nowhere'"):
        small(protocol=plain, allocation={"nowhere": (4, 4)})
    with pytest.raises(ValueError, match=r"allocation\['shared'\] weight.*got 1"):
        small(protocol=plain, allocation={"shared": (1, 4)})


@pytest.mark.parametrize(
    ("widths", "name"), [((1, 8), "bits.weight"), ((8, 17), "bits.activation"), ((8, 2.0), "activ")]
)
def test_widths_outside_the_grid_are_rejected(widths: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BitWidths(*widths)


def test_weight_bytes_counts_by_hand() -> None:
    _, converted = small(BitWidths(4, 4), protocol=Protocol(name="plain", placement="block_output"))
    weights, biases, channels = 8 * 27 + 8 * 72 + 5 * 8, 8 + 8 + 5, 8 + 8 + 5
    float_bytes, quantized = weight_bytes(converted.student)
    assert float_bytes == 4 * (weights + biases)
    # a scale of 32 bits and a zero point of 4 bits each channel; the three sites, behind ReLUs, need no zero point
    assert quantized == -(-(4 * weights + 32 * biases + channels * 36 + 3 * 32) // 8)


def test_drop_only_in_training() -> None:
    _, converted = small()
    site: ActivationSite = next(sites(converted.student))[1]
    site.quantizer.set_range(torch.tensor(0.5), torch.tensor(0.0))
    x = torch.rand(1000)
    site.drop, site.generator = 0.5, torch.Generator().manual_seed(0)
    quantized = site(x)
    assert torch.equal(quantized, site.quantizer(x))
    site.train()
    mixed = site(x)
    assert bool(((mixed == x) | (mixed == quantized)).all())
    assert 0.4 < float((mixed == x).float().mean()) < 0.6


def test_training_mode_changes_nothing_but_the_sites() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    converted = convert(network, torch.zeros(1, 3, 4, 4), QDROP, WEIGHT, ACTIVATION, BitWidths(4, 4))
    images = torch.randn(4, 3, 4, 4)
    before = converted.student.eval()(images)
    after = converted.student.train()(images)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "path", sorted(CONF.glob("bits/*.yaml")) + sorted(CONF.glob("protocol/*.yaml")), ids=lambda p: p.stem
)
def test_configurations_instantiate(path: Path) -> None:
    made = instantiate(OmegaConf.load(path))
    if path.parent.name == "bits":
        assert path.stem == f"w{made.weight}a{made.activation}"
        assert isinstance(made, BitWidths)
    else:
        assert made.name == path.stem
        assert isinstance(made, Protocol)
