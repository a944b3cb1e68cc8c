"""Integers, scales and zero points of a student are what it computes with."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from deployment.integers import activation_grids, integer_weights
from quantizers.adaquant import AdaQuant
from quantizers.layer import hardened_copy, quantized_layers, sites
from quantizers.ranges import MinMax
from tests.deployment.students import net, noise, student_of


@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_from_integers_are_the_students(symmetric: bool) -> None:
    student = student_of(net(), (3, 5), symmetric=symmetric)
    found = integer_weights(student)
    layers = dict(quantized_layers(student))
    assert found.keys() == layers.keys()
    for path, (integers, scale, zero_point, bits, low, high) in found.items():
        assert integers.dtype == zero_point.dtype == torch.int32
        assert torch.equal((integers - zero_point) * scale, layers[path].quantized_weight())
        assert low <= int(integers.min()) <= int(integers.max()) <= high
        assert (bits, high - low) == ((8, 255) if path in ("stem", "fc") else (3, 7))


def test_a_learned_range_is_stated_as_it_is_used() -> None:
    student = student_of(net(), (4, 4), weight=partial(AdaQuant, range=MinMax()))
    with torch.no_grad():
        for _, layer in quantized_layers(student):
            layer.weight_quantizer.zero_point.add_(0.3)
    student = hardened_copy(student)
    for path, weight in integer_weights(student).items():
        own = student.get_submodule(path).quantized_weight()
        assert torch.equal((weight.integers - weight.zero_point) * weight.scale, own)


def test_activations_from_their_grids_are_the_students() -> None:
    student = student_of(net(), (4, 4))
    site_paths = dict(sites(student))
    site_paths["activation_sites.relu"].enabled = False
    found = activation_grids(student)
    assert found.keys() == site_paths.keys() - {"activation_sites.relu"}
    x = noise(3)
    for path, (scale, zero_point, bits, low, high) in found.items():
        q = torch.clamp((x / torch.tensor(scale)).round() + zero_point, low, high)
        assert torch.equal((q - zero_point) * torch.tensor(scale), site_paths[path](x))
        assert high - low == 2**bits - 1


def test_only_what_is_quantized_and_switched_on_has_integers() -> None:
    assert integer_weights(net()) == {}  # the same layers in float
    assert activation_grids(net()) == {}
    student = student_of(net(), (4, 4))
    layers = dict(quantized_layers(student))
    assert len(layers) > 1
    off = next(iter(layers))
    layers[off].enabled = False
    assert integer_weights(student).keys() == layers.keys() - {off}
    for _, site in sites(student):
        site.enabled = False
    assert activation_grids(student) == {}
