"""The table by which bits are allocated: what is timed, what counts as the same, what a repeated kernel does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, fx, nn

from deployment.latency import operator_times
from deployment.latency_table import WIDTHS, fused, latency_table, layer_nodes, repeated
from deployment.onnx_export import INPUT, export_onnx
from deployment.runtime import session
from quantizers.protocol import Protocol
from tests.deployment.students import BLOCK, SIZE, net, noise, student_of

ALL = Protocol(name="all", placement="operands", image=8, operand=8)
Table = dict[str, dict[tuple[int, int], float]]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels in the order in which they are timed; the n-th takes 2^n ms, so that sums tell their parts."""
    seen: list[str] = []

    def measured(clock: Any, optimized: Any, name: str, feed: dict[str, Any]) -> float:
        seen.append(next(node.op_type for node in optimized.graph.node if node.name == name))
        return 1e-3 * 2 ** (len(seen) - 1)

    monkeypatch.setattr("deployment.latency_table._Clock._measured", measured)
    return seen


def table(student: fx.GraphModule, size: tuple[int, ...] = SIZE, **options: Any) -> Table:
    found: Table = {}
    for row in latency_table(student, size, **options):
        found.setdefault(row.layer, {})[row.weight, row.activation] = row.milliseconds
    return found


def parts(milliseconds: float, seen: list[str]) -> Counter[str]:
    return Counter(name for i, name in enumerate(seen) if round(milliseconds) >> i & 1)


def test_widths_with_the_same_kernel_take_the_same_time(timed: list[str]) -> None:
    found = table(student_of(net(), (8, 8), protocol=ALL, symmetric=True))
    assert list(found) == ["stem", "a", "b", "c", "fc"]
    for layer, own in found.items():
        assert set(own) == {(w, a) for w in WIDTHS for a in WIDTHS}
        assert len({own[w, 8] for w in range(2, 9)}) == 1
        assert len({own[w, a] for w in range(2, 9) for a in range(2, 8)}) == 1
        kernel = "QGemm" if layer == "fc" else "QLinearConv"
        assert parts(own[8, 8], timed) == {kernel: 1}
        assert parts(own[4, 4], timed) == {kernel: 1, "Min": 1}
        assert set(parts(own[32, 32], timed)) <= {"Conv", "Gemm"}
    floating = parts(
        found["c"][32, 8], timed
    )  # to floats, computed, kept from being quantized by the runtime, and back
    assert floating == {"DequantizeLinear": 1, "Conv": 1, "Min": 1, "QuantizeLinear": 1}
    assert parts(found["c"][8, 32], timed) == {"DequantizeLinear": 1, "Conv": 1}


def test_weights_of_eight_bits_with_zero_points_are_another_kernel(timed: list[str]) -> None:
    found = table(student_of(net(), (8, 8), protocol=ALL, symmetric=False))["b"]
    assert len({found[w, 8] for w in range(2, 8)}) == 1
    assert found[8, 8] != found[7, 8]
    assert parts(found[8, 8], timed) == parts(found[7, 8], timed) == {"QLinearConv": 1}


def test_processors_without_vnni_tell_eight_bits_from_seven(monkeypatch: pytest.MonkeyPatch, timed: list[str]) -> None:
    for module in ("latency_table", "runtime"):
        monkeypatch.setattr(f"deployment.{module}.has_vnni", lambda: False)
    found = table(student_of(net(), (8, 8), protocol=ALL, symmetric=True))["a"]
    assert found[8, 8] != found[7, 8] == found[2, 8]


def test_a_container_of_four_bits_computes_these_in_float(timed: list[str]) -> None:
    found = table(student_of(net(), (8, 8), protocol=ALL, symmetric=True), container="int4")["a"]
    assert found[5, 8] == found[8, 8] != found[4, 8]
    assert parts(found[4, 8], timed)["Conv"] == 1
    assert parts(found[8, 8], timed) == {"QLinearConv": 1}
    assert (8, 4) not in found  # onnxruntime does not load it


def test_inputs_that_stay_float_have_a_row_for_every_width(timed: list[str]) -> None:
    found = table(student_of(net(), (4, 8), protocol=BLOCK))["fc"]
    assert {found[4, a] for a in WIDTHS} == {found[4, 8]}
    assert set(parts(found[4, 8], timed)) == {"DequantizeLinear", "Gemm"}
    floats = table(student_of(net(), (4, 32), protocol=Protocol(name="weights", placement="layer_input")))
    assert all(set(own) == {(w, 32) for w in WIDTHS} for own in floats.values())


class Twice(nn.Module):
    """One layer called on tensors of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(self.conv(x))).mean((2, 3))


def test_calls_of_a_layer_add_up(timed: list[str]) -> None:
    found = table(student_of(Twice(), (8, 8), protocol=ALL, symmetric=True))["conv"]
    assert parts(found[8, 8], timed) == {"QLinearConv": 2}


def kernels(model: Any, copies: int) -> Iterator[tuple[str, int]]:
    """How often the runtime ran each kernel of a layer that stands in the model so many times more."""
    for node in layer_nodes(list(model.graph.node)):
        path = repeated(model, node.name, copies)
        seen = operator_times(path, noise(1, (8, 4, 4)), calls=4, optimize=False)
        yield node.op_type, sum(row.name == node.name or row.name.startswith(f"{node.name}_copy_") for row in seen)


def test_a_repeated_kernel_runs_so_often_and_changes_nothing() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    student = student_of(Single(), (8, 8), protocol=ALL, symmetric=True, size=(8, 4, 4))
    model = fused(export_onnx(student, (8, 4, 4)).model.SerializeToString(), threads=1)
    assert dict(kernels(model, 3)) == dict.fromkeys(("DequantizeLinear", "Conv"), 4)
    feed = {INPUT: noise(1, (8, 4, 4)).numpy()}
    name = layer_nodes(list(model.graph.node))[-1].name
    before, behind = (
        session(m, optimize=False).run(None, feed) for m in (model.SerializeToString(), repeated(model, name, 5))
    )
    assert (before[0] == behind[0]).all()


def test_a_larger_layer_takes_longer() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.large(self.small(x)).mean((2, 3))

    found = table(student_of(Sizes(), (8, 8), protocol=ALL, symmetric=True, size=(3, 16, 16)), (3, 16, 16), rounds=1)
    for pair in ((8, 8), (32, 32)):
        assert found["large"][pair] > 3 * found["small"][pair] > 0
