"""The student in PyTorch's own operators, and what torch.export makes of it, compute the same bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from deployment.plain import plain
from quantizers.adaround import AdaRound
from quantizers.layer import QuantizedLayer, hardened_copy
from quantizers.ranges import MinMax
from tests.deployment.students import LAYER, SIZE, net, noise, student_of


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (2, 32), (32, 6)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bitwise_the_same(bits: tuple[int, int], symmetric: bool) -> None:
    student = student_of(net(), bits, symmetric=symmetric)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    copied = plain(student)
    assert not any(isinstance(m, QuantizedLayer) for m in copied.modules())
    with torch.no_grad():
        assert torch.equal(copied(noise(5)), student(noise(5)))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_learned_roundings_and_transposed_layers() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, groups=2))
    student = hardened_copy(student_of(network, (3, 4), protocol=LAYER, weight=partial(AdaRound, range=MinMax())))
    with torch.no_grad():
        assert torch.equal(plain(student)(noise(2)), student(noise(2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_export_gives_the_same_bits_for_any_batch() -> None:
    student = student_of(net(), (4, 4))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(plain(student), (torch.zeros(2, *SIZE),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        for count in (1, 7):
            assert torch.equal(program.module()(noise(count)), student(noise(count)))


def test_a_tensor_without_range_stays_float() -> None:
    student = student_of(net())
    student.get_submodule("activation_sites.relu").enabled = False
    with torch.no_grad():
        assert torch.equal(plain(student)(noise(2)), student(noise(2)))
