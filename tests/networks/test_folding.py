"""Folding BatchNorm into convolutions: the same function, the same names, and what must stay as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from networks.architectures import build
from networks.folding import fold_batch_norm
from networks.random_weights import settle
from tests.configuration import composed


def images(*size: int) -> Tensor:
    return torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def with_statistics(network: nn.Module, *size: int) -> nn.Module:
    """In eval mode, with statistics, scales and shifts that are not those of a fresh BatchNorm."""
    return settle(network, (size[0], size[1], size[2]))


class Twice(nn.Module):
    """One convolution runs twice, one is read by its normalisation and by an addition, one is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.read, self.plain = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norm1(self.shared(x)))
        y = self.read(x)
        return self.norm3(self.plain(y + self.norm2(y)))


class Branching(nn.Module):
    """What it computes depends on the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mobilenet_v2", "shufflenet_v2_x0_5"])
def test_a_folded_network_computes_the_same(architecture: str) -> None:
    network = with_statistics(build("torchvision", architecture, 10, 3, {}), 3, 64, 64).double()
    folded, x = fold_batch_norm(network), images(3, 64, 64).double()
    torch.testing.assert_close(folded(x), network(x), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@torch.no_grad()
def test_layers_that_others_use_too_are_left_alone() -> None:
    network = with_statistics(Twice(), 3, 8, 8)
    folded, x = fold_batch_norm(network), images(3, 8, 8)
    torch.testing.assert_close(folded(x), network(x), rtol=1e-5, atol=1e-5)
    assert {name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)} == {"norm1", "norm2"}
    assert torch.equal(folded.get_parameter("shared.weight"), network.get_parameter("shared.weight"))


def test_the_network_itself_stays_as_it_was() -> None:
    network = with_statistics(build("cifar", "resnet8", 10, 3, {}), 3, 16, 16)
    before = copy.deepcopy(network.state_dict())
    fold_batch_norm(network)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_cannot_be_folded_is_said() -> None:
    with pytest.raises(ValueError, match=r"model\.fold_batch_norm: .*got Branching.*model\.fold_batch_norm=false"):
        fold_batch_norm(Branching().eval())
    with pytest.raises(ValueError, match="expected eval mode"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))


@pytest.mark.data
@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "weights"), [("cifar10_resnet20", "cifar10_resnet20"), ("mobilenet_v2", "mobilenet_v2")]
)
def test_folded_teachers_agree_with_their_originals(model: str, weights: str, data_root: Any) -> None:
    checkpoint = f"model.checkpoint={data_root}/weights/{weights}.pth"
    whole, folded, again = (
        instantiate(composed([f"model={name}", checkpoint]).model)
        for name in (model, f"{model}_folded", f"{model}_folded")
    )
    x = images(*whole.input_size)
    expected = whole.network(x)
    assert (folded.network(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert folded.weights_hash == again.weights_hash != whole.weights_hash
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.network.modules())
