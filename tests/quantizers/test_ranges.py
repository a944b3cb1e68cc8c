"""Range estimation against closed forms, torch.quantile and brute force; streams against the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from quantizers.affine import multiples
from quantizers.grid import Grid
from quantizers.histogram import RunningHistogram
from quantizers.ranges import LpSearch, MinMax, Percentile, Range

GRIDS = [
    Grid(bits, signed=signed, symmetric=symmetric)
    for bits, signed, symmetric in itertools.product((2, 4, 8), (False, True), (False, True))
]
RANGES = [MinMax(), Percentile(99.9), LpSearch()]
DEGENERATE = {
    "zeros": torch.zeros(3, 4),
    "positive": torch.full((3, 4), 2.5),
    "negative": torch.full((3, 4), -2.5),
    "one element": torch.tensor([[0.7]]),
    "one zero": torch.tensor([[0.0]]),
    "a dead channel": torch.tensor([[1.0, -2.0], [0.0, 0.0], [0.5, 0.25]]),
    "tiny": torch.full((2, 2), 1e-30),
    "huge": torch.tensor([[1e30, -1e30]]),
}


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    return multiples(x, scale, zero_point, grid) * scale


def draw(kind: str, seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return {"normal": x, "skewed": x.exp() - 0.3, "offset": x + 2, "sparse": x * (x > 1), "cubed": x**3}[kind]


def test_minmax_follows_the_closed_forms() -> None:
    x = torch.tensor([[-1.0, 0.5, 2.0], [0.2, 0.4, 0.6], [-3.0, -2.0, -0.1]])
    scale, zero_point = MinMax().fit(x, Grid(4), 0)
    torch.testing.assert_close(scale, torch.tensor([3 / 15, 0.6 / 15, 3 / 15]))
    assert zero_point.tolist() == [5, 0, 15]
    scale, zero_point = MinMax().fit(x, Grid(4, signed=True), 0)
    assert zero_point.tolist() == [-3, -8, 7]
    scale, zero_point = MinMax().fit(x, Grid(4, signed=True, symmetric=True), 0)
    torch.testing.assert_close(scale, torch.tensor([2 / 7, 0.6 / 7, 3 / 8]))
    assert zero_point.tolist() == [0, 0, 0]
    scale, zero_point = MinMax().fit(x, Grid(4, symmetric=True))
    torch.testing.assert_close(scale, torch.tensor(2 / 15))
    assert (scale.shape, zero_point.item()) == ((), 0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_minmax_clips_nothing_by_more_than_half_a_step(grid: Grid) -> None:
    x = draw("skewed", 0, 5, 40).abs() if grid.one_sided else draw("skewed", 0, 5, 40)
    scale, zero_point = (v.unsqueeze(1) for v in MinMax().fit(x, grid, 0))
    assert bool(((quantize(x, scale, zero_point, grid) - x).abs() <= scale * 0.5001).all())


@pytest.mark.parametrize("percentile", [90.0, 99.9, 100.0])
def test_percentile_agrees_with_torch_quantile(percentile: float) -> None:
    x, share = draw("skewed", 1, 4, 333), percentile / 100
    scale, _ = Percentile(percentile).fit(x, Grid(8), 0)
    low = torch.quantile(x, 1 - share, dim=1).clamp(max=0)
    torch.testing.assert_close(scale, (torch.quantile(x, share, dim=1) - low) / 255)
    scale, _ = Percentile(percentile).fit(x, Grid(8, signed=True, symmetric=True), 0)
    torch.testing.assert_close(scale, torch.quantile(x.abs(), share, dim=1) / 127)
    scale, _ = Percentile(percentile).fit(x.relu(), Grid(8, symmetric=True))
    torch.testing.assert_close(scale, torch.quantile(x.relu(), share) / 255)


def brute_force(x: Tensor, grid: Grid, p: float, zero_points: range) -> tuple[float, float]:
    """Least error over 80 shrink factors and all given zero points, and the scale that has it; one channel, float64."""
    widest = MinMax().fit(x, grid)[0].double()
    best = (float("inf"), 0.0)
    for i, z in itertools.product(range(80), zero_points):
        scale = widest * (1 - 0.01 * i)
        q = torch.clamp(torch.round(x.double() / scale) + z, grid.low, grid.high)
        best = min(best, (((((q - z) * scale - x.double()).abs()) ** p).sum().item(), scale.item()))
    return best


def error(x: Tensor, grid: Grid, p: float, found: tuple[Tensor, Tensor]) -> float:
    return ((quantize(x, *found, grid).double() - x.double()).abs() ** p).sum().item()


@pytest.mark.parametrize("kind", ["normal", "skewed", "cubed"])
@pytest.mark.parametrize("grid", [g for g in GRIDS if g.symmetric], ids=str)
def test_lp_search_with_a_fixed_zero_point_is_brute_force(grid: Grid, kind: str) -> None:
    x = draw(kind, 2, 3, 50)
    scale, _ = LpSearch(p=2.4).fit(x, grid, 0)
    for channel in range(3):
        _, expected = brute_force(x[channel], grid, 2.4, range(1))
        assert scale[channel].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["normal", "skewed", "offset", "sparse", "cubed"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lp_search_with_a_free_zero_point_is_close_to_brute_force(bits: int, kind: str) -> None:
    grid, x = Grid(bits), draw(kind, 3, 4, 60)
    scale, zero_point = LpSearch().fit(x, grid, 0)
    for channel in range(4):
        least, _ = brute_force(x[channel], grid, 2.4, range(grid.high + 1))
        found = error(x[channel], grid, 2.4, (scale[channel], zero_point[channel]))
        assert found <= 1.05 * least + 1e-12
        assert found <= error(x[channel], grid, 2.4, MinMax().fit(x[channel], grid)) + 1e-9


@pytest.mark.parametrize("method", RANGES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_channels_do_not_see_each_other(grid: Grid, method: Range) -> None:
    x = draw("skewed", 4, 6, 5, 2)
    scale, zero_point = method.fit(x, grid, 1)
    for channel in range(5):
        alone = method.fit(x[:, channel], grid)
        torch.testing.assert_close((scale[channel], zero_point[channel]), alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", RANGES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("grid", [*GRIDS, Grid(16)], ids=str)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_inputs_stay_finite_and_keep_zero(name: str, grid: Grid, method: Range) -> None:
    x = DEGENERATE[name]
    observer = method.observer(grid)
    observer.update(x)
    per_channel = [v.unsqueeze(1) for v in method.fit(x, grid, 0)]
    for scale, zero_point in (method.fit(x, grid), observer.compute(), per_channel):
        assert bool((torch.isfinite(scale) & (scale > 0)).all())
        assert bool(((zero_point >= grid.low) & (zero_point <= grid.high) & (zero_point == zero_point.round())).all())
        assert bool(torch.isfinite(quantize(x, scale, zero_point, grid)).all())
        assert bool((quantize(torch.zeros_like(x), scale, zero_point, grid) == 0).all())


def test_a_dead_channel_takes_the_largest_scale() -> None:
    scale, _ = MinMax().fit(DEGENERATE["a dead channel"], Grid(4), 0)
    torch.testing.assert_close(scale, torch.tensor([3 / 15, 3 / 15, 0.5 / 15]))
    assert MinMax().fit(torch.zeros(5), Grid(4))[0].item() == 1


@pytest.mark.parametrize("method", RANGES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_stream_gives_the_range_of_the_whole_in_any_order(grid: Grid, method: Range) -> None:
    x = torch.cat([draw("normal", 5, 400) * 0.01, draw("skewed", 6, 400), draw("cubed", 7, 800) * 3])
    results = []
    for order in (x.split(1600), x.split(100), x.split(100)[::-1], x.flip(0).split(7)):
        observer = method.observer(grid)
        for batch in order:
            observer.update(batch)
        results.append(observer.compute())
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    whole = method.fit(x, grid)
    if isinstance(method, LpSearch):
        assert error(x, grid, 2.4, results[0]) <= 1.02 * error(x, grid, 2.4, whole)
    else:
        torch.testing.assert_close(results[0][0], whole[0], rtol=0.02 if isinstance(method, Percentile) else 0, atol=0)


def test_the_histogram_is_the_one_of_torch() -> None:
    histogram, x = RunningHistogram(64), draw("normal", 8, 5000)
    for batch in (x * 1e-6, x * 0.1, x):
        histogram.update(batch, batch.min().item(), batch.max().item())
    everything = torch.cat([x * 1e-6, x * 0.1, x])
    assert histogram.counts is not None
    edges = (torch.arange(65) + histogram.first) * histogram.width
    assert torch.equal(histogram.counts, torch.histogram(everything, edges).hist.long())
    assert histogram.counts.sum() == everything.numel()
    assert histogram.width <= 2 * (everything.max() - everything.min()) / 63


@pytest.mark.parametrize("method", RANGES, ids=lambda r: type(r).__name__)
def test_unusable_inputs_are_refused(method: Range) -> None:
    for x in (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])):
        with pytest.raises(ValueError, match="x: expected finite values"):
            method.fit(x, Grid(4))
        with pytest.raises(ValueError, match="x: expected finite values"):
            method.observer(Grid(4)).update(x)
    with pytest.raises(ValueError, match="x: expected at least one element"):
        method.fit(torch.zeros(0, 3), Grid(4), 0)
    with pytest.raises(ValueError, match="expected at least one update"):
        method.observer(Grid(4)).compute()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Percentile(50), "percentile"),
        (lambda: Percentile(100.1), "percentile"),
        (lambda: LpSearch(p=0), "p"),
        (lambda: LpSearch(steps=0), "steps"),
        (lambda: LpSearch(smallest=0), "smallest"),
    ],
)
def test_settings_outside_their_domain_are_refused(make, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        make()
