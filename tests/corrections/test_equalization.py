"""Equalization leaves the float function as it is and makes ranges equal; absorption moves what the ReLU passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from corrections.equalization import BiasAbsorption, Equalization
from corrections.layers import add_missing_biases
from corrections.pairs import find_pairs
from quantizers.fold import fold
from quantizers.layer import output_first
from quantizers.trace import Trace
from tests.corrections.networks import Residual, chain, images, lively, outputs_of, residual


def folded(network: nn.Module) -> Trace:
    traced = fold(network, images(1))
    add_missing_biases(traced)
    return traced


def names(traced: Trace, **options: Any) -> list[tuple[str, str]]:
    return [(str(pair.first.target), str(pair.second.target)) for pair in find_pairs(traced, **options)]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity])
def test_float_function_stays(activation: type[nn.Module]) -> None:
    network = chain(activation)
    traced = folded(network)
    assert names(traced) == [("0", "3"), ("3", "6"), ("6", "10"), ("10", "15")]
    before = {path: value.clone() for path, value in traced.graph_module.state_dict().items()}
    facts = Equalization().prepare(traced)
    moved = [float((value / before[path]).log().abs().nan_to_num(0, 0, 0).max()) for path, value in _weights(traced)]
    assert max(moved) > 0.3
    with torch.no_grad():
        torch.testing.assert_close(traced.graph_module(images()), network(images()), rtol=1e-5, atol=1e-5)
    assert facts["last_change"] <= 1e-3
    assert facts["sweeps"] > 1


def _weights(traced: Trace) -> list[tuple[str, Tensor]]:
    return [(path, value) for path, value in traced.graph_module.state_dict().items() if path.endswith("weight")]


def test_ranges_are_equal_afterwards_channel_by_channel() -> None:
    traced = folded(chain())
    Equalization(tolerance=1e-5).prepare(traced)
    weights = {path: traced.graph_module.get_submodule(path).weight for path in ("0", "3", "6", "10", "15")}
    torch.testing.assert_close(_rows(weights["0"]), _rows(weights["3"]), rtol=1e-3, atol=0.0)  # depthwise: its own row
    columns = weights["6"].abs().flatten(1)  # grouped 8 -> 12 in two groups: rows 0..5 read channels 0..3
    expected = torch.cat([columns[:6].amax(0), columns[6:].amax(0)])
    torch.testing.assert_close(_rows(weights["3"]), expected, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(_rows(weights["10"]), weights["15"].abs().amax(0), rtol=1e-3, atol=0.0)


def _rows(weight: Tensor) -> Tensor:
    return weight.abs().flatten(1).amax(1)


def test_one_pair_in_closed_form() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -4.0, 2.0], [0.25, 0.1, 0.0]]).view(2, 3, 1, 1))
        network[2].weight.copy_(torch.tensor([[0.5, 1.0], [1.0, -4.0]]).view(2, 2, 1, 1))
    bias = network[0].bias.clone()
    traced = folded(network)
    Equalization().prepare(traced)
    s = torch.tensor([(4.0 * 1.0) ** 0.5 / 4.0, (0.25 * 4.0) ** 0.5 / 0.25])  # sqrt(r1 r2) / r1
    first, second = traced.graph_module.get_submodule("0"), traced.graph_module.get_submodule("2")
    torch.testing.assert_close(first.weight, (network[0].weight * s.view(2, 1, 1, 1)).detach())
    torch.testing.assert_close(first.bias, (bias * s).detach())
    torch.testing.assert_close(second.weight, (network[2].weight / s.view(1, 2, 1, 1)).detach())


def test_stored_statistics_follow() -> None:
    traced = folded(residual())
    Equalization().prepare(traced)
    seen = outputs_of(traced.graph_module, "conv1", images(64, seed=1))
    torch.testing.assert_close(seen.mean(1), traced.norms["conv1"].beta, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen.std(1), traced.norms["conv1"].gamma, rtol=1e-2, atol=1e-3)


def test_only_tensors_that_nobody_else_reads_and_layers_that_run_once() -> None:
    assert names(folded(residual())) == [("conv1", "conv2")]  # the stem and the sum are read twice; conv2 meets a sum

    class Shared(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), act

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(self.act(self.a(x)))))

    assert names(folded(Shared(nn.ReLU()).eval())) == []
    assert names(folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 1)).eval())) == []
    assert names(folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 4)).eval())) == []
    assert names(folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(8, 4)).eval())) == []  # along the width
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 4)).eval()
    assert names(folded(tokens)) == [("1", "3")]


def test_relu6_only_when_asked() -> None:
    network = lively(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 4, 1)))
    traced = folded(network)
    assert names(traced) == []
    facts = Equalization(replace_relu6=True).prepare(traced)
    assert facts["replaced_relu6"] == 1
    plain = nn.Sequential(network[0], network[1], nn.ReLU(), network[3])  # type: ignore[index]
    torch.testing.assert_close(traced.graph_module(images()), plain(images()), rtol=1e-5, atol=1e-5)


def test_dead_channels_stay_as_they_are() -> None:
    network = chain()
    with torch.no_grad():
        network[0].weight[1] = 0.0  # type: ignore[index]
        network[6].weight[:6, 2] = 0.0  # type: ignore[index]  # nobody reads channel 2
    traced = folded(network)
    Equalization().prepare(traced)
    assert all(value.isfinite().all() for value in traced.graph_module.state_dict().values())
    assert bool((traced.graph_module.get_submodule("3").weight[2] != 0).any())  # type: ignore[index]
    torch.testing.assert_close(traced.graph_module(images()), network(images()), rtol=1e-5, atol=1e-5)


def test_transposed_convolutions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ).eval()
    traced = folded(network)
    Equalization(tolerance=1e-6).prepare(traced)
    layers = [traced.graph_module.get_submodule(path) for path in ("2", "4")]
    torch.testing.assert_close(traced.graph_module(images()), network(images()), rtol=1e-5, atol=1e-5)
    ranges = output_first(layers[0]).abs().flatten(1).amax(1)
    torch.testing.assert_close(ranges, output_first(layers[1]).abs().amax((0, 2, 3)), rtol=1e-4, atol=0.0)


def test_absorption_is_exact_where_the_relu_is_not_met_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    lively(network)
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([0.5, 3.0, 8.0, 30.0]))
        network[1].weight.copy_(torch.tensor([1.0, 1.0, -1.0, 2.0]))
    traced = folded(network)
    before = traced.graph_module.get_submodule("0").bias.clone()  # type: ignore[operator, union-attr]
    c = (traced.norms["0"].beta - 3 * traced.norms["0"].gamma).clamp(min=0)
    assert BiasAbsorption().prepare(traced)["channels"] == int((c > 0).sum())
    torch.testing.assert_close(traced.graph_module.get_submodule("0").bias, before - c)
    assert float(c[0]) == 0.0
    assert float(c[3]) == pytest.approx(24.0, rel=1e-3)
    torch.testing.assert_close(traced.norms["0"].beta, torch.tensor([0.5, 3.0, 8.0, 30.0]) - c)
    difference = (traced.graph_module(images()) - network(images())).detach().abs().amax(1)
    # the channels that absorbed something must not clip anywhere in a window of the second convolution
    clipped = (outputs_of(traced.graph_module, "0", images()).view(4, 12, 8, 8)[c > 0] < 0).any(0)
    clean = ~nn.functional.max_pool2d(clipped.float()[:, None], 3, 1).bool()[:, 0]
    assert float(clean.float().mean()) > 0.3
    assert float(difference[clean].max()) < 1e-4
    assert float(difference[~clean].max()) > 1e-4


def test_absorption_without_batch_norm_says_so() -> None:
    traced = folded(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval())
    assert BiasAbsorption().prepare(traced) == {"channels": 0, "skipped": ["0"]}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="tolerance"):
        Equalization(tolerance=0)
    with pytest.raises(ValueError, match="deviations"):
        BiasAbsorption(deviations=-1)


def test_residual_class_is_untouched() -> None:
    network = lively(Residual())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    Equalization().prepare(folded(network))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
