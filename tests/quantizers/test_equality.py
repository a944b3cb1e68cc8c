"""The student with its quantizers switched off is the teacher, on every classification network of torchvision."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from quantizers.convert import BitWidths, Conversion, convert
from quantizers.layer import WEIGHTED, float_mode, quantized_layers, sites
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax

WEIGHT = partial(Nearest, range=MinMax())
ACTIVATION = partial(NearestActivation, range=MinMax())
QDROP = Protocol(name="qdrop", placement="block_output", first_weight=8, last_weight=8, last_input=8)

LIGHT = ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "efficientnet_b0"]
LIGHT += ["regnet_y_400mf", "googlenet"]
HEAVY = [n for n in torchvision.models.list_models(module=torchvision.models) if n not in LIGHT]
SIDES = {"inception_v3": 75, "alexnet": 63} | dict.fromkeys(
    [n for n in HEAVY + LIGHT if n.startswith(("vit", "maxvit"))], 224
)
TOO_LARGE = "regnet_y_128gf"  # three copies in double precision do not fit into 24 GB

TIMM = ["tf_efficientnet_lite0", "mobilenetv3_small_100", "repvgg_a0"]
TIMM_HEAVY = ["resnet18", "efficientnet_lite0", "regnetx_002", "ghostnet_100", "hardcorenas_a", "dla34", "resnetv2_50"]
TIMM_HEAVY += ["convnext_atto", "nf_resnet26", "eca_nfnet_l0"]


@torch.no_grad()
def with_statistics(network: nn.Module, side: int, dtype: torch.dtype) -> nn.Module:
    """Random affine parameters and the statistics of random images: no normalisation is trivial, nothing explodes."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.normal_(0.0, 0.2, generator=generator)
        norm.momentum = 1.0  # the running statistics become those of the one batch
    for parameter in network.parameters():
        if parameter.ndim > 1 and not parameter.any():  # heads that start at zero would hide every difference
            parameter.normal_(0.0, 0.02, generator=generator)
    network = network.to(dtype)
    if norms:
        network.train()(torch.randn(2, 3, side, side, generator=generator, dtype=dtype))
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.clamp_(min=float(norm.running_var.mean()))  # two images say little: nothing may explode
    return network.eval()


@torch.no_grad()
def check_equal(network: nn.Module, side: int, dtype: torch.dtype, tolerance: float) -> Conversion:
    network = with_statistics(network, side, dtype)
    example = torch.zeros(1, 3, side, side, dtype=dtype)
    converted = convert(network, example, QDROP, WEIGHT, ACTIVATION, BitWidths(4, 4))
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2), dtype=dtype)
    expected = network(images)
    with float_mode(converted.student):
        seen = converted.student(images)
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((seen - expected).abs().max()) <= tolerance * scale
    assert float((converted.reference(images) - expected).abs().max()) <= tolerance * scale
    assert len(list(sites(converted.student))) > 0
    return converted


def torchvision_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    # the auxiliary heads are of training only; their pooling is larger than the feature maps of small images
    plain = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **plain)


def check_torchvision(name: str) -> None:
    network = torchvision_network(name)
    # In double precision a difference is a mistake, not rounding that deep random networks amplify. Where nothing is
    # folded single precision is exact as well.
    folds = any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    dtype, tolerance = (torch.float64, 1e-9) if folds and name != TOO_LARGE else (torch.float32, 5e-5 if folds else 0.0)
    converted = check_equal(network, SIDES.get(name, 64), dtype, tolerance)
    quantized = {path for path, _ in quantized_layers(converted.student)}
    weighted = {path for path, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    left = {path.removesuffix(".weight") for path in converted.left_float}
    assert quantized == weighted - left
    assert not left or name.startswith(("vit", "swin"))


@pytest.mark.parametrize("name", LIGHT)
def test_equals_torchvision(name: str) -> None:
    check_torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_equals_torchvision_heavy(name: str) -> None:
    check_torchvision(name)


@pytest.mark.parametrize("name", [*TIMM, *(pytest.param(name, marks=pytest.mark.slow) for name in TIMM_HEAVY)])
def test_equals_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False)
    converted = check_equal(network, 64, torch.float64, 1e-9)
    quantized = {path for path, _ in quantized_layers(converted.student)}
    assert quantized == {path for path, m in network.named_modules() if isinstance(m, WEIGHTED)}
    assert converted.left_float == {}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_equals_in_single_precision(name: str) -> None:
    check_equal(torchvision_network(name), 64, torch.float32, 1e-5)
