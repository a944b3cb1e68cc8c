"""Bias correction removes the shift of every channel's mean; the analytic form is the paper's closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from corrections.bias_correction import AnalyticBiasCorrection, BiasCorrection
from corrections.layers import own_layers
from quantizers.layer import float_mode
from tests.corrections.networks import calibration, chain, images, outputs_of, residual, student_of


@pytest.mark.parametrize("make", [chain, residual])
def test_means_of_every_layer_are_those_of_the_float_network(make: object) -> None:
    conversion = student_of(make())  # type: ignore[operator]
    student, reference, batch = conversion.student, conversion.reference, images()
    layers = own_layers(student)

    def shift() -> float:
        pairs = [(outputs_of(graph, path, batch).mean(1) for graph in (student, reference)) for path in layers]
        return max(float((a - b).abs().max()) for a, b in pairs)

    assert shift() > 1e-2
    facts = BiasCorrection().apply(calibration(conversion))
    assert shift() < 1e-5
    assert facts["layers"] == len(layers)


def test_weights_and_the_reference_stay() -> None:
    conversion = student_of(residual())
    before = {key: value.clone() for key, value in conversion.student.state_dict().items()}
    reference = {key: value.clone() for key, value in conversion.reference.state_dict().items()}
    BiasCorrection().apply(calibration(conversion))
    changed = {key for key, value in conversion.student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(key.endswith("layer.bias") for key in changed)
    assert all(torch.equal(value, reference[key]) for key, value in conversion.reference.state_dict().items())


def test_analytic_form_behind_batch_norm_and_relu() -> None:
    network = chain()
    conversion = student_of(network, bits=(3, 32))
    layer = conversion.student.get_submodule("6")  # grouped, reads ReLU of the BatchNorm "4"
    before = layer.bias.clone()  # type: ignore[operator, union-attr]
    AnalyticBiasCorrection().apply(calibration(conversion, 0))
    norm = network[4]  # type: ignore[index]
    share = (norm.running_var / (norm.running_var + norm.eps)).sqrt()
    expected = []
    for beta, gamma in zip(norm.bias.tolist(), (norm.weight.abs() * share).tolist(), strict=True):
        density = math.exp(-0.5 * (beta / gamma) ** 2) / math.sqrt(2 * math.pi)
        expected.append(gamma * density + beta * 0.5 * (1 + math.erf(beta / gamma / math.sqrt(2))))
    error = (layer.quantized_weight() - layer.weight).flatten(1).tolist()  # type: ignore[operator]
    for row in range(12):
        inputs = expected[:4] if row < 6 else expected[4:]
        shift = sum(e * x for e, x in zip(error[row], inputs, strict=True))
        assert float(layer.bias[row] - before[row]) == pytest.approx(-shift, abs=1e-6)  # type: ignore[index]


def test_analytic_form_reduces_the_shift_of_the_logits() -> None:
    conversion = student_of(chain(), bits=(3, 32))
    student, reference, batch = conversion.student, conversion.reference, images(256, seed=1)

    def shift() -> float:
        logits = [graph(batch).mean(0) for graph in (student, reference)]
        return float((logits[0] - logits[1]).norm())

    before = shift()
    facts = AnalyticBiasCorrection().apply(calibration(conversion, 0))
    assert shift() < 0.7 * before
    assert facts["skipped"] == []


def test_analytic_form_leaves_out_what_lies_behind_an_unknown_operator() -> None:
    class Unknown(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, norm, second, third = self
            return third(second(torch.relu(norm(first(x)))).sort(-1).values)

    torch.manual_seed(0)
    network = Unknown(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)).eval()
    conversion = student_of(network, bits=(3, 32))
    alone = AnalyticBiasCorrection().apply(calibration(conversion, 0))
    assert alone["skipped"] == ["3"]
    assert alone["layers"] == 2


def test_layers_that_run_twice_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.conv(torch.relu(self.conv(x)))))

    torch.manual_seed(0)
    conversion = student_of(Twice().eval())
    before = conversion.student.get_submodule("conv").bias.clone()  # type: ignore[operator, union-attr]
    assert BiasCorrection().apply(calibration(conversion))["layers"] == 1
    assert torch.equal(conversion.student.get_submodule("conv").bias, before)  # type: ignore[arg-type]


def test_without_error_nothing_moves() -> None:
    conversion = student_of(residual(), bits=(16, 32))
    with float_mode(conversion.student):
        assert BiasCorrection().apply(calibration(conversion))["largest_shift"] < 1e-6


def test_needs_images() -> None:
    with pytest.raises(ValueError, match="images: expected a non-empty batch"):
        BiasCorrection().apply(calibration(student_of(residual()), 0))


def test_one_image_and_a_dead_channel_stay_finite() -> None:
    network = residual()
    with torch.no_grad():
        network.conv1.weight[2] = 0.0  # type: ignore[index, union-attr]
    conversion = student_of(network)
    for correction in (BiasCorrection(), AnalyticBiasCorrection()):
        correction.apply(calibration(conversion, 1))
    assert all(value.isfinite().all() for value in conversion.student.state_dict().values())


def test_only_layers_without_batch_norm_when_asked() -> None:
    conversion = student_of(residual())
    before = {key: value.clone() for key, value in conversion.student.state_dict().items()}
    assert BiasCorrection(layers="without_batch_norm").apply(calibration(conversion))["layers"] == 1
    after = conversion.student.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {"fc.layer.bias"}
    with pytest.raises(ValueError, match="layers: expected one of all, without_batch_norm"):
        BiasCorrection(layers="some")  # type: ignore[arg-type]
