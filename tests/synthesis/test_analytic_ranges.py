"""Ranges without images against closed forms on small networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from networks.cifar_resnet import CifarResNet
from networks.random_weights import settle
from quantizers.convert import convert
from quantizers.layer import sites
from synthesis.analytic_ranges import GAUSS, LAPLACE, AnalyticRange, Deviations, OptimalClipping, set_analytic_ranges
from tests.configuration import composed

SIZE = (3, 8, 8)


def small(activation: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 5, 3), nn.AdaptiveAvgPool2d(1)]
    network = nn.Sequential(*layers, nn.Flatten()).eval()
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([0.5, -1.0, 2.0, 0.1]))  # type: ignore[operator, union-attr]
        network[1].bias.copy_(torch.tensor([0.0, 1.0, -1.0, 3.0]))  # type: ignore[operator, union-attr]
    return network


def calibrated(network: nn.Module, rule: AnalyticRange, protocol: str = "all_layers", bits: int = 4) -> dict[str, Any]:
    cfg = composed([f"protocol={protocol}", f"bits.activation={bits}", "weight=nearest", "activation=fixed"])
    parts = [instantiate(cfg[name]) for name in ("protocol", "weight", "activation", "bits")]
    conversion = convert(network, torch.zeros(1, *SIZE), *parts)
    set_analytic_ranges(conversion, rule=rule)
    return {path.rpartition(".")[2]: site.quantizer for path, site in sites(conversion.student)}


def test_deviations_behind_batch_norm_and_relu() -> None:
    quantizer = calibrated(small(nn.ReLU()), Deviations(6))["_2"]
    share = (1 / (1 + 1e-5)) ** 0.5  # the stored variance is 1
    high = max(b + 6 * abs(g) * share for g, b in zip((0.5, -1.0, 2.0, 0.1), (0.0, 1.0, -1.0, 3.0), strict=True))
    assert float(quantizer.scale) == pytest.approx(high / 15, rel=1e-5)
    assert float(quantizer.zero_point) == quantizer.grid.low


def test_relu6_bounds_the_range() -> None:
    assert float(calibrated(small(nn.ReLU6()), Deviations(6))["_2"].scale) == pytest.approx(6 / 15)


@pytest.mark.parametrize(("distribution", "table"), [("gauss", GAUSS), ("laplace", LAPLACE)])
def test_optimal_clipping_takes_one_bit_more_behind_a_relu(distribution: Any, table: dict[int, float]) -> None:
    gammas, betas = torch.tensor([0.5, -1.0, 2.0, 0.1]), torch.tensor([0.0, 1.0, -1.0, 3.0])
    var = (gammas.square() / (1 + 1e-5) + (betas - betas.mean()).square()).mean()
    scale = var.sqrt() if distribution == "gauss" else (var / 2).sqrt()
    high = float(betas.mean() + table[5] * scale)
    quantizer = calibrated(small(nn.ReLU()), OptimalClipping(distribution))["_2"]
    assert float(quantizer.scale) == pytest.approx(high / 15, rel=1e-5)


@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
def test_optimal_clipping_loses_least_on_its_own_distribution(distribution: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=rng)
    if distribution == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).icdf(torch.rand(200_000, generator=rng).clamp(1e-6, 1 - 1e-6))
    table = GAUSS if distribution == "gauss" else LAPLACE

    def error(alpha: float) -> float:
        step = 2 * alpha / 2**4
        return float(((x.clamp(-alpha, alpha) / step).round() * step - x).square().mean())

    best = error(table[4])
    assert all(error(factor * table[4]) > 0.98 * best for factor in (0.6, 0.8, 0.9, 1.1, 1.25, 1.6))


@pytest.mark.parametrize("protocol", ["brecq", "zeroq", "all_layers"])
@pytest.mark.parametrize("rule", [Deviations(), OptimalClipping("laplace")])
def test_every_site_of_a_residual_network_gets_a_range_that_covers_most(protocol: str, rule: AnalyticRange) -> None:
    torch.manual_seed(0)
    network = CifarResNet(8).eval()
    settle(network, SIZE, 0)
    quantizers = calibrated(network, rule, protocol, bits=8)
    assert quantizers
    for quantizer in quantizers.values():
        assert quantizer.scale.isfinite()
        assert quantizer.scale > 0
        assert quantizer.scale != 1


def test_bad_rules_are_named() -> None:
    with pytest.raises(ValueError, match=r"calibration\.rule\.n"):
        Deviations(0)
    with pytest.raises(ValueError, match=r"calibration\.rule\.distribution"):
        OptimalClipping("cauchy")  # type: ignore[arg-type]
