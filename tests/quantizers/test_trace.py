"""Tracing keeps what the network computes: in place operators, untraceable parts, scopes, shapes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from quantizers.convert import BitWidths, convert
from quantizers.layer import float_mode, quantized_layers, sites
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax
from quantizers.trace import trace

WEIGHT = partial(Nearest, range=MinMax())
ACTIVATION = partial(NearestActivation, range=MinMax())
QDROP = Protocol(name="qdrop", placement="block_output", first_weight=8, last_weight=8, last_input=8)


def assert_same(network: nn.Module, graph: nn.Module, *shape: int) -> None:
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(graph(images.clone()), network.eval()(images.clone()))


def test_scopes_and_shapes_of_resnet18() -> None:
    graph = trace(torchvision.models.resnet18(weights=None), torch.zeros(1, 3, 64, 64)).graph_module.graph
    nodes = {n.name: n for n in graph.nodes}
    assert nodes["layer1_0_conv1"].meta == nodes["layer1_0_conv1"].meta | {
        "scope": "layer1.0.conv1",
        "is_tensor": True,
        "shape": (1, 64, 16, 16),
    }
    assert [n.meta["scope"] for n in graph.nodes if n.op == "call_function"][:2] == ["layer1.0", "layer1.1"]
    assert nodes["flatten"].meta["scope"] == ""
    assert all(n.meta["is_tensor"] for n in graph.nodes if n.op == "call_module")


class InPlace(nn.Module):
    """Reads tensors after they were changed in place: a pre-activation residual block with an in place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(self.relu(x))  # the skip below sees max(x, 0)
        y += x
        y.mul_(0.5)
        z = F.relu(y, inplace=True)
        w = torch.relu_(self.conv(z))
        return F.elu_(w - 1) + y


def test_nothing_in_place_remains_and_the_result_is_the_same() -> None:
    torch.manual_seed(0)
    network = InPlace()
    graph_module, opaque, _ = trace(network, torch.zeros(1, 3, 4, 4))
    assert opaque == {}
    assert_same(network, graph_module, 3, 4, 4)
    values: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Tensor:
            value = super().run_node(n)
            for name, (before, copy) in kept.items():
                assert torch.equal(before, copy), f"{n.name} changed {name}"
            kept[n.name] = (value, value.clone())
            return value

    kept: dict[str, tuple[Tensor, Tensor]] = {}
    Watch(graph_module).run(torch.randn(1, 3, 4, 4))
    assert len(kept) > 8
    assert values == {}
    assert network.relu.inplace


class OnAView(nn.Module):
    """Changes a view in place: the graph cannot say so, and the network must stay as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        half = x[:, :2]
        half.mul_(3.0)
        return x


class DataDependent(nn.Module):
    """Takes one of two branches, by the sum of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class Branching(nn.Module):
    """One part cannot be traced, the rest can."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.block = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), DataDependent()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.block(F.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Untraceable(nn.Module):
    """The outermost forward branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.fc(y.mean((2, 3)) if y.sum() > 0 else y.amax((2, 3)))


@pytest.mark.parametrize(
    ("kind", "opaque"), [(OnAView, ["network"]), (Branching, ["block"]), (Untraceable, ["network"])]
)
def test_untraceable_parts_stay_whole(kind: type[nn.Module], opaque: list[str]) -> None:
    torch.manual_seed(0)
    network = kind()
    traced = trace(network, torch.zeros(1, 3, 6, 6))
    assert list(traced.opaque) == opaque
    assert_same(network, traced.graph_module, 3, 6, 6)


def test_layers_of_opaque_modules_are_quantized_in_place() -> None:
    torch.manual_seed(0)
    network = Branching().eval()
    converted = convert(network, torch.zeros(1, 3, 6, 6), QDROP, WEIGHT, ACTIVATION, BitWidths(4, 5))
    assert {path for path, _ in quantized_layers(converted.student)} == {"stem", "block.a", "block.b", "head"}
    inside = [(r.name, r.bits) for r in converted.report if r.kind == "activation" and r.name.startswith("block.")]
    assert inside == [("block.a.input_site", 5), ("block.b.input_site", 5)]
    assert converted.left_float == {}
    with float_mode(converted.student):
        assert_same(network, converted.student, 3, 6, 6)


def test_untraceable_network_is_quantized_in_place() -> None:
    torch.manual_seed(0)
    network = Untraceable().eval()
    converted = convert(network, torch.zeros(1, 3, 6, 6), QDROP, WEIGHT, ACTIVATION, BitWidths(4, 4))
    widths = {path: layer.weight_quantizer.grid.bits for path, layer in quantized_layers(converted.student)}
    assert widths == {"network.conv": 8, "network.fc": 8}
    assert {path for path, _ in sites(converted.student)} == {"network.fc.input_site"}  # the image stays float
    with float_mode(converted.student):
        assert_same(network, converted.student, 3, 6, 6)


def test_attention_is_left_float_and_says_so() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Linear(9, 8), layer, nn.Linear(8, 3))
    converted = convert(network, torch.zeros(1, 3, 6, 6), QDROP, WEIGHT, ACTIVATION, BitWidths(8, 8))
    assert any("in_proj_weight" in path for path in converted.left_float)
    with float_mode(converted.student):
        assert_same(network, converted.student, 3, 6, 6)


class Functional(nn.Module):
    """Weights passed to functions, one of them computed (standardised), one used twice; an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), Standardised(4, 4, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.conv2d(x, self.first.weight, self.first.bias, stride=2)
        x = self.second(F.relu(self.second(x)))
        if mask is not None:
            x = x * mask
        return F.linear(F.relu(x).mean((2, 3)), self.weight, self.bias)


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al., arXiv 1903.10520)."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def test_weights_passed_to_functions_become_layers() -> None:
    torch.manual_seed(0)
    network = Functional()
    graph_module = trace(network, torch.zeros(1, 3, 9, 9)).graph_module
    assert_same(network, graph_module, 3, 9, 9)
    called = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_module"]
    assert called.count("second") == 2
    assert not [n for n in graph_module.graph.nodes if n.target in (F.conv2d, F.linear)]
    assert len([n for n in graph_module.graph.nodes if n.op == "placeholder"]) == 1


def test_parametrizations_are_evaluated() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten())
    graph_module = trace(network, torch.zeros(1, 3, 6, 6)).graph_module
    assert_same(network, graph_module, 3, 6, 6)
    assert [type(m) for m in graph_module.children()] == [nn.Conv2d, nn.ReLU, nn.Flatten]


def test_wrong_example_is_explained() -> None:
    with pytest.raises(ValueError, match=r"example: .*\(1, 1, 8, 8\).*own input size"):
        trace(torchvision.models.squeezenet1_1(weights=None), torch.zeros(1, 1, 8, 8))
