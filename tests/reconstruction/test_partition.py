from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch
import torchvision
from torch import fx, nn

from networks.cifar_resnet import CifarResNet
from quantizers.fold import fold
from reconstruction.activations import ActivationCache
from reconstruction.extract import extract
from reconstruction.partition import Granularity, constants, partition
from tests.reconstruction.students import images, resnet8, student_of

LIGHT = {"resnet18": 64, "mobilenet_v2": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 64}
HEAVY = {
    "regnet_x_400mf": 64,
    "densenet121": 64,
    "googlenet": 64,
    "efficientnet_b0": 64,
    "mnasnet0_5": 64,
    "inception_v3": 96,
    "convnext_tiny": 64,
    "swin_t": 64,
    "vit_b_16": 224,
}
BLOCKS = {
    "resnet18": [
        "conv1",
        "layer1.0",
        "layer1.1",
        "layer2.0",
        "layer2.1",
        "layer3.0",
        "layer3.1",
        "layer4.0",
        "layer4.1",
        "fc",
    ],
    "squeezenet1_1": ["features.0", *(f"features.{i}" for i in (3, 4, 6, 7, 9, 10, 11, 12)), "classifier.1"],
    "mobilenet_v2": ["features.0.0", *(f"features.{i}" for i in range(1, 18)), "features.18.0", "classifier.1"],
    "shufflenet_v2_x0_5": [
        "conv1.0",
        *(f"stage{stage}.{i}" for stage, count in ((2, 4), (3, 8), (4, 4)) for i in range(count)),
        "conv5.0",
        "fc",
    ],
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "cifar_resnet20":
        return CifarResNet(20).eval()
    if name == "small_vit":
        return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()
    arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, **arguments).eval()


def check(name: str, size: int) -> None:
    """Every granularity covers the graph once, has unique names, and replays to the same bits."""
    x = images(3, size, channels=3)
    reference = fold(build(name), x[:1]).graph_module
    with torch.no_grad():
        expected = reference(x)
    fixed = constants(reference.graph)
    nodes = {n.name for n in reference.graph.nodes if n not in fixed}
    for granularity in get_args(Granularity):
        units = partition(reference, granularity)
        assert Counter(n for unit in units for n in unit.nodes) == Counter(nodes)
        assert len({unit.name for unit in units}) == len(units)
        cache = ActivationCache(reference, reference, units=units, images=x, batch_size=len(x))
        cache.enter(len(units) - 1)
        assert torch.equal(cache.target, expected)
        assert cache.peak_bytes == cache.bytes_expected
        if granularity == "block":
            assert all(len(unit.inputs) == 1 and len(unit.outputs) == 1 for unit in units)


@pytest.mark.parametrize(("name", "size"), [("cifar_resnet20", 16), ("small_vit", 32), *LIGHT.items()])
def test_replaying_the_units_gives_the_networks_bits(name: str, size: int) -> None:
    check(name, size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), list(HEAVY.items()))
def test_replaying_the_units_of_larger_networks(name: str, size: int) -> None:
    check(name, size)


@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_replaying_the_students_units_gives_its_bits(granularity: Granularity) -> None:
    x = images(5)
    conversion = student_of(resnet8(), x)
    units = partition(conversion.reference, granularity)
    cache = ActivationCache(conversion.reference, conversion.student, units=units, images=x, batch_size=5)
    cache.enter(len(units) - 1)
    with torch.no_grad():
        (output,) = cache.student_module(*cache.student_inputs)
        assert torch.equal(output, conversion.student(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_networks_own(name: str) -> None:
    units = partition(fx.symbolic_trace(build(name)), "block")
    assert [unit.name for unit in units if unit.layers] == BLOCKS[name]


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("efficientnet_b0", "features.2.1"),
        ("regnet_x_400mf", "trunk_output.block2.block2-0"),
        ("inception_v3", "Mixed_5b"),
        ("densenet121", "features.denseblock2"),
        ("googlenet", "inception4a"),
        ("convnext_tiny", "features.5.3"),
        ("small_vit", "encoder.layers.encoder_layer_1"),
    ],
)
def test_blocks_of_other_families(name: str, block: str) -> None:
    assert block in [unit.name for unit in partition(fx.symbolic_trace(build(name)), "block")]


def test_stages_are_the_containers_of_blocks() -> None:
    stages = [unit.name for unit in partition(fold(build("resnet18"), images(1, 64, 3)).graph_module, "stage")]
    assert stages == ["conv1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]
    dense = [unit.name for unit in partition(fx.symbolic_trace(build("densenet121")), "stage") if unit.layers]
    assert "features.denseblock3" in dense


def test_layer_units_are_single_layers_with_their_activation() -> None:
    network = build("resnet18")
    reference = fold(network, images(1, 64, 3)).graph_module
    units = partition(reference, "layer")
    layers = [name for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    learned = [unit for unit in units if unit.layers]
    assert sorted(layer for unit in learned for layer in unit.layers) == sorted(layers)
    assert all(len(unit.layers) == len(unit.inputs) == len(unit.outputs) == 1 for unit in learned)
    followed = extract(reference, next(unit for unit in learned if unit.name == "layer1.0.conv1"))
    alone = extract(reference, next(unit for unit in learned if unit.name == "layer1.0.conv2"))
    assert any(isinstance(m, nn.ReLU) for m in followed.modules())
    assert not any(isinstance(m, nn.ReLU) for m in alone.modules())


def test_extracted_units_share_their_parameters() -> None:
    conversion = student_of(resnet8(), images(4))
    unit = partition(conversion.reference, "block")[1]
    shared = {id(p) for p in extract(conversion.student, unit).parameters()}
    assert shared
    assert shared <= {id(p) for p in conversion.student.parameters()}


class _Reused(nn.Module):
    """One layer called twice, an activation behind another branch, and a constant made from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.layer(x)
        b = self.other(x)
        return self.layer(a.relu() + b + self.shift.exp()) * self.shift.exp()


@pytest.mark.parametrize("granularity", get_args(Granularity))
def test_repeated_layers_late_activations_and_constants(granularity: Granularity) -> None:
    x = torch.randn(3, 4)
    network = fold(_Reused().eval(), x[:1]).graph_module
    units = partition(network, granularity)
    cache = ActivationCache(network, network, units=units, images=x, batch_size=3)
    cache.enter(len(units) - 1)
    with torch.no_grad():
        assert torch.equal(cache.target, network(x))
    assert len({unit.name for unit in units}) == len(units)
    if granularity == "layer":
        assert [unit.name for unit in units if unit.layers] == ["layer", "other", "layer#2"]
        assert "relu" in units[0].nodes


def test_unknown_granularity_and_several_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="granularity"):
        partition(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))), "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one input"):
        partition(fx.symbolic_trace(nn.Bilinear(2, 2, 2)), "block")
