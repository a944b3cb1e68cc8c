"""BN re-estimation: exact pooled statistics, unchanged integers, the equation, and an identity for a float network."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from corrections.bn_reestimation import BNReestimation
from corrections.execution import PooledMoments, output_moments
from corrections.layers import output_first, own_layers
from quantizers.layer import quantized_layers
from quantizers.nearest import Nearest
from quantizers.ranges import MinMax
from tests.configuration import CONF, options
from tests.corrections.networks import calibration, chain, images, outputs_of, residual, student_of


@pytest.mark.parametrize("make", [chain, residual])
def test_every_normalised_layer_has_the_stored_moments_again(make: object) -> None:
    conversion = student_of(make())  # type: ignore[operator]
    facts = BNReestimation(largest_gain=None).apply(calibration(conversion))
    assert facts["layers"] == len(conversion.norms) > 2
    for path, (beta, gamma) in conversion.norms.items():
        seen = outputs_of(conversion.student, path, images()).double()
        torch.testing.assert_close(seen.mean(1).float(), beta, rtol=1e-5, atol=1e-5)
        # k^2 var, where eps keeps the last 1e-5 away
        torch.testing.assert_close(seen.var(1, correction=0).float(), gamma.square(), rtol=1e-3, atol=1e-4)


def test_first_layer_follows_the_equation() -> None:
    conversion = student_of(residual())
    layer = conversion.student.get_submodule("stem")
    beta, gamma = conversion.norms["stem"]
    weight, bias = layer.weight.clone(), layer.bias.clone()  # type: ignore[operator, union-attr]
    seen = outputs_of(conversion.student, "stem", images()).double()  # all images in one go
    BNReestimation(largest_gain=None).apply(calibration(conversion))
    k = ((gamma.double().square() + 1e-5) / (seen.var(1, correction=0) + 1e-5)).sqrt()
    torch.testing.assert_close(layer.weight, (weight * k.view(-1, 1, 1, 1)).float())
    torch.testing.assert_close(layer.bias, (k * (bias - seen.mean(1)) + beta).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", options("weight"))
def test_integers_stay_whatever_rounds_the_weights(option: str) -> None:
    weight = instantiate(OmegaConf.load(CONF / "weight" / f"{option}.yaml"))
    conversion = student_of(residual(), weight=weight)
    layers = dict(quantized_layers(conversion.student))
    before = {path: layer.weight_quantizer.integers(output_first(layer.layer)) for path, layer in layers.items()}
    BNReestimation().apply(calibration(conversion))
    for path, layer in layers.items():
        q, scale, zero_point = layer.weight_quantizer.integers(output_first(layer.layer))
        assert torch.equal(q, before[path][0])
        assert torch.equal(zero_point, before[path][2])
        assert (path == "fc") == torch.equal(scale, before[path][1])


def test_a_weight_on_a_threshold_keeps_its_integer() -> None:
    weight = partial(Nearest, range=MinMax(), symmetric=True)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.randint(-14, 15, (64, 3, 3, 3)) / 2 + 0.0)  # type: ignore[operator, union-attr]
        network[0].weight[:, 0, 0, 0] = 7.0  # type: ignore[index, union-attr]
    conversion = student_of(network, weight=weight, bits=(4, 4))
    layer = dict(quantized_layers(conversion.student))["0"]
    before = layer.weight_quantizer.integers(layer.weight)[0]
    BNReestimation(largest_gain=None).apply(calibration(conversion))
    assert torch.equal(layer.weight_quantizer.integers(layer.weight)[0], before)


def test_identity_before_reestimation() -> None:
    network = residual()
    conversion = student_of(network, bits=(32, 32))
    for path, norm in (("stem", "norm"), ("conv1", "bn1"), ("conv2", "bn2")):
        module = network.get_submodule(norm)
        beta, gamma = conversion.norms[path]
        torch.testing.assert_close(beta, module.bias.detach())  # type: ignore[union-attr]
        torch.testing.assert_close(gamma, module.weight.detach().abs(), rtol=1e-3, atol=1e-4)  # type: ignore[union-attr]
    before = conversion.student(images())
    case = calibration(conversion)._replace(images=images(64, seed=1))  # those that the BatchNorm layers have seen
    facts = BNReestimation().apply(case)
    assert facts["gains"] == pytest.approx([1.0, 1.0], abs=1e-2)  # n against n - 1 in the stored variance
    torch.testing.assert_close(conversion.student(images()), before, rtol=0.02, atol=0.02)


def test_statistics_are_pooled_over_unequal_batches() -> None:
    conversion = student_of(residual())
    found = output_moments(conversion.student, own_layers(conversion.student), images(13), 5)
    for path, moments in found.items():
        seen = outputs_of(conversion.student, path, images(13)).double()
        torch.testing.assert_close(moments.mean, seen.mean(1))
        torch.testing.assert_close(moments.var, seen.var(1, correction=0))


def test_pooling_does_not_cancel_far_from_zero() -> None:
    rows = torch.randn(3, 999, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e8
    moments = PooledMoments()
    for part in rows.split(400, dim=1):
        moments.update(part)
    torch.testing.assert_close(moments.var, rows.var(1, correction=0), rtol=1e-6, atol=0.0)


def test_against_the_reference_for_networks_without_batch_norm() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    conversion = student_of(network)
    with pytest.raises(ValueError, match=r"bn_reestimation_reference"):
        BNReestimation().apply(calibration(conversion))
    assert BNReestimation("reference", largest_gain=None).apply(calibration(conversion))["layers"] == 3
    for path in ("0", "2"):
        ours, theirs = (outputs_of(graph, path, images()) for graph in (conversion.student, conversion.reference))
        torch.testing.assert_close(ours.mean(1), theirs.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.std(1), theirs.std(1), rtol=1e-3, atol=1e-4)


def test_gains_are_bounded_and_dead_channels_and_single_images_stay_finite() -> None:
    network = residual()
    with torch.no_grad():
        network.conv1.weight[2] = 0.0  # type: ignore[index, union-attr]
    conversion = student_of(network)
    facts = BNReestimation(largest_gain=2.0).apply(calibration(conversion, 1))
    assert 0.5 <= facts["gains"][0] <= facts["gains"][1] <= 2.0
    assert facts["bounded_channels"] >= 1
    assert all(value.isfinite().all() for value in conversion.student.state_dict().values())


def test_one_scale_for_the_whole_weight_is_refused() -> None:
    conversion = student_of(residual(), weight=partial(Nearest, range=MinMax(), channel_axis=None))
    with pytest.raises(ValueError, match=r"weight\.channel_axis=0"):
        BNReestimation().apply(calibration(conversion))


@pytest.mark.parametrize(
    ("arguments", "name"), [({"target": "x"}, "target"), ({"eps": 0.0}, "eps"), ({"largest_gain": 0.5}, "largest_gain")]
)
def test_bad_arguments_are_named(arguments: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BNReestimation(**arguments)
