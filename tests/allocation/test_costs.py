"""Costs against what students really hold, and against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from allocation import costs
from allocation.groups import Choice, Group, bits_of, choices_of, find_groups
from allocation.hardware import Hardware
from allocation.live import peak_memory, with_borders
from quantizers.convert import BitWidths, Conversion
from quantizers.layer import ActivationSite, QuantizedLayer
from quantizers.report import weight_bytes
from tests.allocation.networks import images, protocol, student

PAIRS = [(w, a) for w in (2, 4, 8) for a in (3, 6)]
Problem = tuple[Conversion, list[Group], list[list[Choice]]]


def problem(name: str = "qdrop", hardware: Hardware | None = None) -> Problem:
    conversion = student(protocol=protocol(name))
    groups = find_groups(conversion)
    found = choices_of(
        groups, conversion, protocol(name), BitWidths(4, 4), pairs=PAIRS, hardware=hardware or Hardware("any")
    )
    return conversion, groups, found


@pytest.mark.parametrize("seed", range(4))
def test_size_is_that_of_the_converted_student(seed: int) -> None:
    conversion, groups, choices = problem()
    draw = np.random.default_rng(seed)
    chosen = [int(draw.integers(len(own))) for own in choices]
    bits = bits_of(groups, [own[i] for own, i in zip(choices, chosen, strict=True)])
    made = student(protocol=protocol("qdrop"), allocation=bits).student
    layers = [m for m in made.modules() if isinstance(m, QuantizedLayer)]
    floats = sum(m.layer.weight.numel() for m in layers) * 4
    biases = sum(m.bias.numel() for m in layers) * 4
    sites = sum(
        8 * 4 + m.quantizer.grid.bits * (not m.quantizer.grid.symmetric)
        for m in made.modules()
        if isinstance(m, ActivationSite)
    )
    expected = weight_bytes(made)[1] - biases - sites / 8
    amount = costs.size(groups, choices, conversion.student).amount(chosen) * floats
    assert amount == pytest.approx(expected, abs=1.0)  # whole bytes there


def test_equal_widths_have_their_own_average() -> None:
    conversion, groups, choices = problem()
    found = costs.average_bits(groups, choices, conversion.student)
    for width in (2, 4, 8):
        chosen = [next(i for i, c in enumerate(own) if c.pair[0] == width or len(own) == 1) for own in choices]
        assert found.amount(chosen) == pytest.approx(width)
    fixed = costs.average_bits(groups, [own[:1] for own in choices], conversion.student)
    assert fixed.amount([0] * len(groups)) == 0


def test_macs_of_resnet18_are_the_published_ones() -> None:
    network = torchvision.models.resnet18(weights=None).eval()
    layers = [path for path, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    groups = [Group(name=path, layers=(path,), reads=((),), nodes=()) for path in layers]
    macs = costs.macs_of(network, groups, torch.zeros(2, 3, 224, 224))
    assert sum(macs.values()) == 1_814_073_344  # 1.814 GMAC, torchvision's own count


def test_bit_operations_energy_and_transposed_layers_by_hand(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(12, 5))
    groups = [Group(name=str(i), layers=(str(i),), reads=((),), nodes=()) for i in range(3)]
    macs = costs.macs_of(network, groups, torch.zeros(2, 3, 8, 8))
    assert macs == {"0": 36 * 8 * 27, "1": 36 * 8 * 16, "2": 4 * 12 * 12 * 5}
    choices = [[Choice((w, a), ((w, a),), ()) for w, a in ((2, 32), (8, 8))] for _ in groups]
    assert costs.bitops(groups, choices, macs).amount([0, 1, 1]) == pytest.approx(
        (macs["0"] * 64 + macs["1"] * 64 + macs["2"] * 64) / 1e9
    )
    horowitz = costs.energy(groups, choices, macs)
    assert horowitz.amount([0, 1, 1]) == pytest.approx((macs["0"] * 4.6 + (macs["1"] + macs["2"]) * 0.3) / 1e6)
    table = tmp_path / "energy.csv"
    table.write_text("weight,activation,picojoules\n2,32,1\n8,8,0.5\n")
    own = costs.energy(groups, choices, macs, table)
    assert own.amount([0, 0, 1]) == pytest.approx((macs["0"] + macs["1"] + macs["2"] / 2) / 1e6)
    table.write_text("weight,activation,picojoules\n8,8,0.5\n")
    with pytest.raises(ValueError, match=r"energy_table.*\(2, 32\)"):
        costs.energy(groups, choices, macs, table)


def test_latency_comes_from_csv_or_json(tmp_path: Path) -> None:
    groups = [Group(name="a", layers=("a", "b"), reads=((), ()), nodes=())]
    choices = [[Choice((4, 8), ((4, 8), (8, 8)), ()), Choice((8, 8), ((8, 8), (8, 8)), ())]]
    rows = [("a", 4, 8, 1.0), ("a", 8, 8, 2.0), ("b", 8, 8, 0.25)]
    keys = ("layer", "weight", "activation", "milliseconds")
    (tmp_path / "t.json").write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
    (tmp_path / "t.csv").write_text("\n".join(",".join(map(str, row)) for row in (keys, *rows)))
    for name in ("t.json", "t.csv"):
        found = costs.latency(groups, choices, tmp_path / name)
        assert [found.amount([i]) for i in (0, 1)] == [1.25, 2.25]
    (tmp_path / "t.csv").write_text("layer,weight,activation,milliseconds\na,4,8,1\n")
    with pytest.raises(ValueError, match=r"latency_table.*layer b.*\(8, 8\)"):
        costs.latency(groups, choices, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("layer,weight,activation,milliseconds\na,4,8,-1\n")
    with pytest.raises(ValueError, match="at least 0"):
        costs.latency(groups, choices, tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("layer,weight,milliseconds\na,4,1\n")
    with pytest.raises(ValueError, match="weight, activation and numbers"):
        costs.latency(groups, choices, tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"csv or json file, got .*missing\.csv"):
        costs.latency(groups, choices, tmp_path / "missing.csv")


def test_peak_memory_is_that_of_the_fullest_moment() -> None:
    """Counted by running the student: a tensor lives from its site to its last reader."""
    conversion, groups, choices = problem()
    chosen = [len(own) - 1 - i % 2 if len(own) > 1 else 0 for i, own in enumerate(choices)]
    bits = bits_of(groups, [own[i] for own, i in zip(choices, chosen, strict=True)])
    made = student(protocol=protocol("qdrop"), allocation=bits).student
    nodes = list(made.graph.nodes)
    peak = 0.0
    for time in range(len(nodes)):
        alive = 0.0
        for i, node in enumerate(nodes[: time + 1]):
            module = made.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, ActivationSite) and any(nodes.index(user) >= time for user in node.users):
                alive += torch.Size(node.meta["shape"]).numel() * module.quantizer.grid.bits / 8
            assert i <= time
        peak = max(peak, alive)
    found = peak_memory(groups, choices, conversion.student)
    assert len(found.rows) > 1
    assert found.amount(chosen) == pytest.approx(peak / 2**20)


def test_a_change_of_width_costs_the_elements_of_the_tensor() -> None:
    hardware = Hardware("h", conversion=2.0)
    conversion, groups, choices = problem(hardware=hardware)
    bits = costs.bitops(groups, choices, costs.macs_of(conversion.reference, groups, images(1)))
    found = with_borders(bits, groups, choices, conversion, hardware)
    names = [group.name for group in groups]

    def due(**widths: int) -> float:
        chosen = [
            next(i for i, c in enumerate(own) if len(own) == 1 or c.pair[1] == widths.get(group.name, 3))
            for group, own in zip(groups, choices, strict=True)
        ]
        return found.due(chosen)

    # stem -> conv1 and its shortcut (8 x 8 x 8) -> conv2 (12 x 4 x 4) -> left, right -> depthwise -> fc
    base = due()
    assert due(depthwise=6) == pytest.approx(base + 2.0 * 12 * 4 * 4 / 1e6)  # left and right feed it; fc differs anyway
    assert names[3] == "left"
    assert with_borders(bits, groups, choices, conversion, Hardware("any")) is bits
