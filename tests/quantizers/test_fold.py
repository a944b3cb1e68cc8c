"""Folding is exact wherever it is allowed, and refrains elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from quantizers.fold import FrozenNorm, fold


@torch.no_grad()
def randomised(network: nn.Module) -> nn.Module:
    for norm in network.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.3, 3.0)  # type: ignore[union-attr]
            if norm.affine:
                norm.weight.uniform_(-1.5, 1.5)
                norm.bias.normal_()
    return network.eval()


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
        (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False, eps=0.1), (4, 7, 7)),
        (lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (4, 4, 4, 4)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
        (lambda: nn.Linear(4, 6, bias=False), lambda: nn.BatchNorm1d(6), (4,)),
    ],
)
def test_every_kind_of_layer(layer: Callable, norm: Callable, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = randomised(nn.Sequential(layer(), norm(), nn.ReLU())).double()
    images = torch.randn(3, *shape, dtype=torch.float64)
    folded = fold(network, images).graph_module
    torch.testing.assert_close(folded(images), network(images))
    assert [n.target for n in folded.graph.nodes if n.op == "call_module"] == ["0", "2"]


def test_agrees_with_torch_fusion() -> None:
    torch.manual_seed(0)
    convolution = randomised(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    linear = randomised(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))
    for network, fuse, shape in ((convolution, fuse_conv_bn_eval, (1, 3, 5, 5)), (linear, fuse_linear_bn_eval, (2, 3))):
        ours = fold(network, torch.zeros(shape)).graph_module.get_submodule("0")
        theirs = fuse(network[0], network[1])  # type: ignore[index]
        torch.testing.assert_close(ours.weight, theirs.weight.detach())
        torch.testing.assert_close(ours.bias, theirs.bias.detach())


class Residual(nn.Module):
    """Normalisations that must not be folded: read twice, shared, before the convolution, behind a sum."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.case == "read twice":
            return self.norm(y) + y
        if self.case == "shared convolution":
            return self.norm(self.conv(torch.relu(y)))
        if self.case == "shared normalisation":
            return self.norm(self.other(torch.relu(self.norm(y))))
        if self.case == "before":
            return self.conv(torch.relu(self.norm(x)))
        return self.norm(y + x)


@pytest.mark.parametrize("case", ["read twice", "shared convolution", "before", "behind a sum"])
def test_refrains(case: str) -> None:
    torch.manual_seed(0)
    network = randomised(Residual(case))
    images = torch.randn(2, 4, 6, 6)
    folded = fold(network, images).graph_module
    torch.testing.assert_close(folded(images), network(images))
    assert isinstance(folded.get_submodule("norm"), FrozenNorm)
    assert torch.equal(folded.get_submodule("conv").weight, network.conv.weight)  # type: ignore[arg-type, union-attr]


def test_hands_out_what_was_stored() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5), nn.ReLU(), nn.Conv2d(6, 2, 3)
    )
    randomised(network)
    traced = fold(network, torch.zeros(1, 4, 9, 9))
    assert set(traced.norms) == {"0", "1"}  # frozen, folded
    for path, norm in (("0", network[0]), ("1", network[2])):
        # the output for an input of exactly the stored mean and variance
        entering = norm.running_mean + norm.running_var.sqrt() * torch.tensor([-1.0, 1.0]).view(2, 1)  # type: ignore[operator, union-attr]
        leaving = norm(entering[:, :, None, None])[:, :, 0, 0]
        torch.testing.assert_close(traced.norms[path].beta, leaving.mean(0).detach())
        torch.testing.assert_close(traced.norms[path].gamma, leaving.std(0, correction=0).detach())


def test_shared_normalisation() -> None:
    torch.manual_seed(0)
    network = randomised(Residual("shared normalisation"))
    images = torch.randn(2, 4, 6, 6)
    folded = fold(network, images).graph_module
    torch.testing.assert_close(folded(images), network(images))


def test_linear_over_tokens_is_not_mistaken_for_channels() -> None:
    torch.manual_seed(0)
    network = randomised(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)))  # (N, 6, 4) -> (N, 6, 6)
    images = torch.randn(2, 6, 4)
    folded = fold(network, images).graph_module
    torch.testing.assert_close(folded(images), network(images))
    assert isinstance(folded.get_submodule("1"), FrozenNorm)
