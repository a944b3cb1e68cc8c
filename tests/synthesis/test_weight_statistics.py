"""GZSQ's recursion against a loop over channels, and what both sources refuse."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import nn

from lightning_modules.synthesis import build_generator
from networks.cifar_resnet import CifarResNet
from networks.random_weights import settle
from synthesis.moments import Probe
from synthesis.propagation import propagate
from synthesis.sources import Pixels
from synthesis.weight_statistics import Adjustment, PropagatedMoments, WeightGaussian

SIZE = (3, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 2, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


PICKS = {
    "min": min,
    "mean_minus_min": lambda v: statistics.fmean(v) - min(v),
    "mean_plus_min": lambda v: statistics.fmean(v) + min(v),
    "mean": statistics.fmean,
    "max_minus_mean": lambda v: max(v) - statistics.fmean(v),
    "max_plus_mean": lambda v: max(v) + statistics.fmean(v),
    "max": max,
}


@pytest.mark.parametrize("adjustment", PICKS)
def test_recursion_against_a_loop_over_channels(adjustment: Adjustment) -> None:
    found = WeightGaussian(adjustment).targets(network(), SIZE, Probe())
    means, deviations = [0.0] * 3, [1.0] * 3
    for name, target in found.items():
        layer = network().get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        if layer.out_channels != len(means):
            means, deviations = ([PICKS[adjustment](v)] * layer.out_channels for v in (means, deviations))
        for channel in range(layer.out_channels):
            weights = layer.weight[channel].flatten().tolist()
            bias = 0.0 if layer.bias is None else float(layer.bias.detach()[channel])
            means[channel] += statistics.fmean(weights) + bias
            deviations[channel] = math.hypot(statistics.pstdev(weights), deviations[channel])
        torch.testing.assert_close(target.moments.mean, torch.tensor(means), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target.moments.var.sqrt(), torch.tensor(deviations), rtol=1e-4, atol=1e-5)
        assert target.slack.mean == 0 == target.slack.spread
    assert list(found) == ["0", "2", "4"]


def test_folded_batch_norm_enters_as_weights_and_biases() -> None:
    """mu(n) = mu_Wfold(n) + b_fold(n) + mu(n-1), W_fold = gamma W / sqrt(v + eps), b_fold = beta - gamma m / ..."""
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    plain = nn.Sequential(*layers, nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    settle(plain, SIZE).requires_grad_(False)
    module = build_generator(
        plain,
        SIZE,
        count=2,
        seed=0,
        steps=1,
        batch_size=2,
        source=Pixels,
        optimizer=torch.optim.Adam,
        targets=WeightGaussian(),
        fold_batch_norm=True,
    )
    found = module.alignment.targets.targets(module.alignment.network, SIZE, Probe())
    means, variances = [0.0] * 3, [1.0] * 3
    for name, norm in (("0", plain[1]), ("3", plain[4])):
        layer = plain.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        for c in range(3):
            scale = float(norm.weight[c]) / math.sqrt(float(norm.running_var[c]) + norm.eps)
            own = 0.0 if layer.bias is None else float(layer.bias[c])
            folded_bias = float(norm.bias[c]) + scale * (own - float(norm.running_mean[c]))
            weights = [scale * w for w in layer.weight[c].flatten().tolist()]
            means[c] += statistics.fmean(weights) + folded_bias
            variances[c] += statistics.pvariance(weights)
        torch.testing.assert_close(found[name].moments.mean, torch.tensor(means), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[name].moments.var, torch.tensor(variances), rtol=1e-4, atol=1e-5)


def test_propagated_targets_are_the_propagated_moments_of_that_colour() -> None:
    source = PropagatedMoments([0.1, 0.2, 0.3], 0.5)
    found = source.targets(network(), SIZE, Probe())
    expected = propagate(network(), SIZE, source.prior)
    for name, moments in expected.items():
        assert torch.equal(found[name].moments.mean, moments.mean)
        assert torch.equal(found[name].moments.var, moments.var)
    assert source.site == WeightGaussian().site == "conv_output"


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"got 'bn1'; fold it .*generator\.fold_batch_norm=true"):
        WeightGaussian().targets(CifarResNet(8), SIZE, Probe())
    with pytest.raises(ValueError, match=r"targets\.adjustment: expected a statistic to carry 3 channels on to the 5"):
        WeightGaussian("none").targets(network(), SIZE, Probe())
    with pytest.raises(ValueError, match=r"targets\.adjustment: expected one of"):
        WeightGaussian("median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"targets\.input_std"):
        PropagatedMoments(0.0, 0.0)
