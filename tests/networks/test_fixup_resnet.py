"""Fixup's initialisation against its own claims, and training's multipliers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.cifar_resnet import CifarResNet
from networks.fixup_resnet import FixupBlock, FixupResNet, add_branch_multipliers, fold_branch_multipliers


def images(n: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_has_no_normalisation_and_the_layers_of_the_other_resnet() -> None:
    fixup, other = FixupResNet(20), CifarResNet(20)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in fixup.modules())

    def weights(network: nn.Module) -> dict[str, tuple[int, ...]]:
        kinds = (nn.Conv2d, nn.Linear)
        return {name: tuple(m.weight.shape) for name, m in network.named_modules() if isinstance(m, kinds)}

    assert weights(fixup) == weights(other)


def test_every_block_starts_as_its_shortcut_and_the_classifier_at_zero() -> None:
    network = FixupResNet(14, num_classes=7)
    x = torch.rand(2, 16, 8, 8)
    for block in network.layer1:
        assert torch.equal(block(x), x)  # x >= 0
    assert torch.equal(network(images()), torch.zeros(8, 7))


@pytest.mark.parametrize("depth", [8, 110])
def test_first_convolutions_shrink_with_the_square_root_of_the_branches(depth: int) -> None:
    torch.manual_seed(0)
    network = FixupResNet(depth)
    block = network.layer3[-1]
    assert isinstance(block, FixupBlock)
    he = (2 / block.conv1.weight[0].numel()) ** 0.5
    assert float(block.conv1.weight.detach().std()) == pytest.approx(he * ((depth - 2) / 2) ** -0.5, rel=0.03)


def test_multipliers_fold_into_the_weights() -> None:
    torch.manual_seed(0)
    network = FixupResNet(8)
    names = set(network.state_dict())
    scales = add_branch_multipliers(network)
    assert len(scales) == 3
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images()), torch.arange(8)).backward()
        optimizer.step()
    assert all(float((scale.detach() - 1).abs()) > 0 for scale in scales)
    expected = network(images())
    fold_branch_multipliers(network)
    torch.testing.assert_close(network(images()), expected)
    assert set(network.state_dict()) == names


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="depth: expected 6n"):
        FixupResNet(21)
