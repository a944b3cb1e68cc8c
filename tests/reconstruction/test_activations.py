from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from quantizers.fold import fold
from reconstruction import memory
from reconstruction.activations import ActivationCache
from reconstruction.memory import choose_residency, estimate_bytes
from reconstruction.partition import partition
from tests.reconstruction.students import images, resnet8, student_of


def cache_of(count: int = 7, granularity: str = "block", **arguments: object) -> ActivationCache:
    x = images(count)
    conversion = student_of(resnet8(), images(8))
    units = partition(conversion.reference, granularity)  # type: ignore[arg-type]
    return ActivationCache(conversion.reference, conversion.student, units=units, images=x, **arguments)  # type: ignore[arg-type]


def shaped(network: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Traced as it is (nothing taken out of place), with the shapes at its nodes."""
    traced = fx.symbolic_trace(network.eval())
    ShapeProp(traced).propagate(example)
    for node in traced.graph.nodes:
        node.meta["shape"] = tuple(node.meta["tensor_meta"].shape)
    return traced


def values(cache: ActivationCache) -> list[torch.Tensor]:
    return [t.float().clone() for t in (*cache.student_inputs, *cache.teacher_inputs, *cache.targets)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_entering_by_any_way_gives_the_same_bits(granularity: str) -> None:
    straight = cache_of(granularity=granularity, batch_size=3)
    winding = cache_of(granularity=granularity, batch_size=3)
    straight.enter(4)
    for k in (0, 1, 2, 2, 5, 4, 4):
        winding.enter(k)
    assert equal(values(straight), values(winding))


def test_entering_again_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of()
    cache.enter(3)
    monkeypatch.setattr(cache, "_run", lambda side: pytest.fail("ran a unit again"))
    cache.enter(3)


def test_going_on_costs_one_forward_of_each_unit() -> None:
    cache = cache_of()
    calls: list[str] = []
    run = cache._run
    cache._run = lambda side: (calls.append(side), run(side))[1]  # type: ignore[method-assign, func-returns-value]
    cache.enter(len(cache.units) - 1)
    assert calls.count("teacher") == len(cache.units)
    assert calls.count("student") == len(cache.units) - 1


def test_student_inputs_of_all_images_come_from_the_quantized_units_in_front() -> None:
    """The released AdaQuant replaces the first batch only."""
    cache = cache_of(7, "layer", batch_size=2)
    cache.enter(1)
    first = cache.cutters["student"].extract(cache.units[0])
    with torch.no_grad():
        (expected,) = first(cache.images)
    torch.testing.assert_close(cache.student_input, expected)
    assert all(not torch.equal(q, x) for q, x in zip(cache.student_input, cache.teacher_input, strict=True))


def test_in_parallel_the_student_reads_the_teachers_values_and_never_runs() -> None:
    for granularity in ("layer", "block"):
        cache = cache_of(5, granularity, parallel=True)
        run = cache._run
        cache._run = lambda side, run=run: run(side) if side == "teacher" else pytest.fail("ran")  # type: ignore[method-assign]
        for k in range(len(cache.units)):
            cache.enter(k)
            assert equal(cache.student_inputs, cache.teacher_inputs)
        assert cache.peak_bytes == cache.bytes_expected
        with torch.no_grad():
            torch.testing.assert_close(cache.target, cache.cutters["teacher"].graph_module(cache.images))


def test_another_version_starts_from_the_images_again() -> None:
    cache = cache_of()
    cache.enter(3)
    before = cache.student_input.clone()
    layer = cache.cutters["student"].graph_module.get_submodule("conv1")
    with torch.no_grad():
        layer.layer.bias.add_(1.0)
    cache.enter(3)
    assert torch.equal(cache.student_input, before)
    cache.enter(3, version=1)
    assert not torch.equal(cache.student_input, before)


@pytest.mark.parametrize("residency", ["cpu", "disk", "auto"])
def test_residencies_hold_the_same_bits(residency: str) -> None:
    expected, other = cache_of(residency="device"), cache_of(residency=residency)
    for k in (1, 4):
        expected.enter(k)
        other.enter(k)
        assert equal(values(expected), values(other))
        index = torch.tensor([3, 0, 3])
        assert torch.equal(other.pick(other.targets, index)[0], expected.target[index])


def test_half_residency_is_close_and_keeps_targets_in_full() -> None:
    expected, half = cache_of(residency="device"), cache_of(residency="half")
    expected.enter(1)
    half.enter(1)
    assert half.student_input.dtype == half.teacher_input.dtype == torch.float16
    assert half.target.dtype == torch.float32
    torch.testing.assert_close(half.target, expected.target, rtol=1e-2, atol=1e-2)
    assert half.pick(half.student_inputs, torch.tensor([0]))[0].dtype == torch.float32


def test_half_residency_refuses_numbers_that_it_cannot_hold() -> None:
    network = shaped(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    cache = ActivationCache(
        network, network, units=partition(network, "network"), images=torch.full((1, 2), 1e6), residency="half"
    )
    with pytest.raises(ValueError, match="65504"):
        cache.enter(0)


def test_dead_values_are_freed_and_the_estimate_is_what_is_held() -> None:
    for granularity in ("layer", "block", "network"):
        cache = cache_of(5, granularity)
        assert cache.bytes_expected == estimate_bytes(cache.cutters["teacher"].graph_module, cache.units, 5)
        for k in range(len(cache.units)):
            cache.enter(k)
            read = {name for unit in cache.units[k:] for name in unit.inputs}
            assert set(cache._values["teacher"]) <= read | set(cache.units[k].outputs)
        assert cache.peak_bytes == cache.bytes_expected


def test_values_follow_the_images_also_for_one_image_and_for_odd_batches() -> None:
    for count in (1, 5):
        whole, sliced = cache_of(count, batch_size=count), cache_of(count, batch_size=2)
        whole.enter(3)
        sliced.enter(3)
        assert sliced.target.shape[0] == count
        torch.testing.assert_close(whole.target, sliced.target)


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def test_modules_that_work_in_place_do_not_reach_what_is_kept() -> None:
    network = shaped(_InPlace(), torch.zeros(1, 4))
    x = torch.randn(4, 4)
    before = x.clone()
    cache = ActivationCache(network, network, units=partition(network, "layer"), images=x)
    cache.enter(0)
    assert torch.equal(cache.student_input, before)
    cache.enter(1)
    assert torch.equal(x, before)


class _Windows(nn.Module):
    """Folds positions into the batch, as windowed attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).view(-1, 2))


def test_values_without_a_row_per_image_are_refused_by_name() -> None:
    network = fold(_Windows().eval(), torch.zeros(1, 4)).graph_module
    cache = ActivationCache(network, network, units=partition(network, "layer"), images=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="granularity"):
        cache.enter(2)


def test_auto_takes_the_first_place_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    assert choose_residency("auto", 400, cpu) == "device"
    assert choose_residency("auto", 600, cpu) == "disk"
    assert choose_residency("half", 600, cpu) == "half"
    with pytest.raises(ValueError, match="residency"):
        choose_residency("tape", 1, cpu)  # type: ignore[arg-type]


def test_free_memory_is_plausible() -> None:
    assert 2**20 < memory.free_memory() <= 2**62


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="images"):
        cache_of(0)
    with pytest.raises(ValueError, match="batch_size"):
        cache_of(2, batch_size=0)
    with pytest.raises(ValueError, match="index"):
        cache_of(2).enter(99)
