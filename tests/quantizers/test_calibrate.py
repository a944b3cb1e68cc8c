"""Ranges come from all images, seen in float, and do not depend on how they are cut into batches."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from quantizers.calibrate import calibrate_ranges
from quantizers.convert import BitWidths, Conversion, convert
from quantizers.grid import Grid
from quantizers.layer import sites
from quantizers.nearest import Nearest, NearestActivation
from quantizers.protocol import Protocol
from quantizers.ranges import MinMax

QDROP = Protocol(name="qdrop", placement="block_output", first_weight=8, last_weight=8, last_input=8)


def conversion(network: nn.Module, weight_bits: int = 2) -> Conversion:
    weight, activation = partial(Nearest, range=MinMax()), partial(NearestActivation, range=MinMax())
    return convert(network, torch.zeros(1, 3, 6, 6), QDROP, weight, activation, BitWidths(weight_bits, 4))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 2)
    ).eval()


def test_ranges_are_those_of_the_float_tensors_of_all_images() -> None:
    teacher = network()
    images = torch.randn(7, 3, 6, 6)
    images[6] *= 10  # the extremes stand in the last, smaller batch
    student = conversion(teacher).student
    calibrate_ranges(student, images, batch_size=3)
    with torch.no_grad():
        for path, count, bits, signed in (("_2", 3, 4, False), ("_4", 5, 8, True)):
            site = dict(sites(student))[f"activation_sites.{path}"]
            # never negative: zero point 0; otherwise free on unsigned integers
            scale, zero_point = MinMax().fit(teacher[:count](images), Grid(bits, symmetric=not signed))
            torch.testing.assert_close(site.quantizer.scale, scale)
            torch.testing.assert_close(site.quantizer.zero_point, zero_point)
            assert site.enabled


def test_every_hook_is_gone_and_modes_are_restored() -> None:
    student = conversion(network()).student
    site = next(sites(student))[1]
    site.train()
    calibrate_ranges(student, torch.randn(4, 3, 6, 6), batch_size=4)
    assert site.training
    assert not student.training
    before = site.quantizer.scale.clone()
    student(100 * torch.randn(4, 3, 6, 6))
    assert torch.equal(before, site.quantizer.scale)


class Either(nn.Module):
    """A branch that images with a positive sum never take."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() >= 0 else self.b(x)


def test_tensors_never_seen_are_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    student = conversion(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Either(), nn.Flatten(), nn.Linear(144, 2))
    ).student
    with caplog.at_level(logging.WARNING):
        calibrate_ranges(student, torch.randn(4, 3, 6, 6), batch_size=2)
    switched = {path: site.enabled for path, site in sites(student)}
    assert switched["2.a.input_site"]
    assert not switched["2.b.input_site"]
    assert "2.b.input_site" in caplog.text


def test_arguments_are_checked() -> None:
    student = conversion(network()).student
    with pytest.raises(ValueError, match=r"batch_size: .*got 0"):
        calibrate_ranges(student, torch.randn(4, 3, 6, 6), batch_size=0)
    with pytest.raises(ValueError, match=r"images: .*\(0, 3, 6, 6\)"):
        calibrate_ranges(student, torch.zeros(0, 3, 6, 6), batch_size=2)
