"""Ties of real and small networks, and choices that conversion then really makes."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from allocation.groups import bits_of, choices_of, find_groups
from allocation.hardware import Hardware, kind_of
from quantizers.convert import BitWidths, Conversion, convert
from quantizers.layer import QuantizedLayer, sites
from quantizers.nearest import Nearest, NearestActivation
from quantizers.ranges import MinMax
from tests.allocation.networks import PLAIN, protocol, student, tied

ANY = Hardware("any")
WIDTHS = [(w, a) for w in (2, 4, 8) for a in (3, 6)]


def ties(conversion: Conversion) -> list[tuple[str, ...]]:
    return [group.layers for group in find_groups(conversion)]


def test_shortcut_concatenation_and_shared_inputs_move_together() -> None:
    shared = [("stem",), ("conv1", "short"), ("conv2",), ("left", "right"), ("depthwise",), ("fc",)]
    assert ties(student()) == shared
    assert ties(student(protocol=protocol("zeroq"))) == shared


def test_branches_that_are_quantized_before_they_are_joined_are_tied() -> None:
    """With the zeroq protocol the concatenation itself is not quantized: its two branches are."""
    conversion = student(protocol=protocol("zeroq"))
    (depthwise,) = [group for group in find_groups(conversion) if group.name == "depthwise"]
    assert len(depthwise.sites) == 2
    converted = student(protocol=protocol("zeroq"), allocation={"depthwise": (4, 7)})
    widths = {path: site.quantizer.grid.bits for path, site in sites(converted.student)}
    assert [widths[path] for path in depthwise.sites] == [7, 7]
    assert set(widths.values()) == {4, 7}


def test_resnet18_ties_the_downsampling_shortcut() -> None:
    network = torchvision.models.resnet18(weights=None)
    parts = (partial(Nearest, range=MinMax()), partial(NearestActivation, range=MinMax()), BitWidths(4, 4))
    found = ties(convert(network, torch.zeros(1, 3, 32, 32), protocol("brecq"), *parts))
    assert [group for group in found if len(group) > 1] == [
        (f"layer{i}.0.conv1", f"layer{i}.0.downsample.0") for i in (2, 3, 4)
    ]
    assert sum(len(group) for group in found) == 21


@pytest.mark.parametrize("name", ["brecq", "qdrop", "zeroq", "all_layers"])
def test_conversion_makes_what_was_chosen(name: str) -> None:
    """Any mixture of choices: every width in the student is the one that the choice states."""
    conversion = student(protocol=protocol(name))
    groups = find_groups(conversion)
    options = choices_of(groups, conversion, protocol(name), BitWidths(4, 4), pairs=WIDTHS, hardware=ANY)
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        chosen = [o[int(torch.randint(len(o), (), generator=draw))] for o in options]
        made = student(protocol=protocol(name), allocation=bits_of(groups, chosen))
        found = {path: site.quantizer.grid.bits for path, site in sites(made.student)}
        for group, choice in zip(groups, chosen, strict=True):
            layers = [made.student.get_submodule(path) for path in group.layers]
            assert all(isinstance(layer, QuantizedLayer) for layer in layers)
            assert [layer.weight_quantizer.grid.bits for layer in layers] == [w for w, _ in choice.layers]
            assert [found[path] for path in group.sites] == list(choice.sites)


def test_protocols_leave_less_to_choose() -> None:
    def counts(name: str) -> list[int]:
        conversion = student(protocol=protocol(name))
        groups = find_groups(conversion)
        return [
            len(o) for o in choices_of(groups, conversion, protocol(name), BitWidths(4, 4), pairs=WIDTHS, hardware=ANY)
        ]

    assert counts("brecq") == [1, 3, 6, 6, 6, 1]  # ends fixed; the stem's output has 8 bits
    assert counts("qdrop") == [1, 6, 6, 6, 6, 1]
    assert counts("zeroq") == [3, 6, 6, 6, 6, 6]  # the image is float


def test_choices_are_legal_for_the_hardware(caplog: pytest.LogCaptureFixture) -> None:
    conversion = student(bits=(4, 8))
    groups = find_groups(conversion)

    def options(hardware: Hardware, pairs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        found = choices_of(groups, conversion, PLAIN, BitWidths(4, 8), pairs=pairs, hardware=hardware)
        return [[choice.pair for choice in choices] for choices in found]

    eight = Hardware("h", [[4, 8], [8, 8]], operators={"depthwise": [[8, 8]]})
    found = options(eight, [(w, a) for w in (2, 4, 8) for a in (4, 8)])
    assert found[0] == [(4, 32), (8, 32)]  # a float image goes with any weight of the list
    assert found[1:4] == [[(4, 8), (8, 8)]] * 3
    assert found[4] == [(8, 8)]
    with pytest.raises(ValueError, match=r"stem that hardware=h supports, got \[\(2, 32\), \(3, 32\)\]"):
        options(eight, [(2, 4), (3, 4)])
    with caplog.at_level(logging.WARNING):
        assert options(Hardware("int8", [[8, 8]]), [(4, 8)])[2] == [(4, 8)]
    assert "does not list" in caplog.text


def test_kinds_of_operators() -> None:
    network = tied()
    assert [kind_of(getattr(network, name)) for name in ("conv1", "depthwise", "fc")] == [
        "convolution",
        "depthwise",
        "linear",
    ]
    assert kind_of(nn.ConvTranspose2d(4, 4, 2, groups=4)) == "depthwise"
    assert kind_of(nn.Conv2d(1, 4, 2)) == "convolution"


def test_wrong_hardware_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hardware\.operators.*got \['matmul'\]"):
        Hardware("h", operators={"matmul": [[8, 8]]})
    with pytest.raises(ValueError, match=r"hardware\.pairs.*got \[8\]"):
        Hardware("h", [[8]])
    with pytest.raises(ValueError, match=r"hardware\.pairs.*got 1"):
        Hardware("h", [[1, 8]])
    with pytest.raises(ValueError, match="at least one pair"):
        Hardware("h", [])
    with pytest.raises(ValueError, match=r"hardware\.conversion.*got -1"):
        Hardware("h", conversion=-1)
