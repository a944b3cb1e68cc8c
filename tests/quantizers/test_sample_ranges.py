"""The mean of samples' extremes against a plain loop."""

from __future__ import annotations

import pytest
import torch

from quantizers.affine import from_bounds
from quantizers.grid import activation_grid
from quantizers.ranges import MinMax
from quantizers.sample_ranges import SampleMinMax


def an_activation(n: int = 7) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, n + 1).view(
        -1, 1, 1, 1
    )


@pytest.mark.parametrize("signed", [True, False])
def test_against_a_loop_over_samples(signed: bool) -> None:
    x = an_activation() if signed else an_activation().relu()
    grid = activation_grid(4, signed=signed, symmetric=False)
    low = sum(float(sample.min()) for sample in x) / len(x)
    high = sum(float(sample.max()) for sample in x) / len(x)
    expected = from_bounds(torch.tensor([low]), torch.tensor([high]), grid)
    for found, wanted in zip(SampleMinMax().fit(x, grid), expected, strict=True):
        torch.testing.assert_close(found, wanted.squeeze(0))
    assert float(SampleMinMax().fit(x, grid)[0]) < float(MinMax().fit(x, grid)[0])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stream_gives_the_range_of_the_whole(size: int) -> None:
    x, grid = an_activation(), activation_grid(4, signed=True, symmetric=False)
    observer = SampleMinMax().observer(grid)
    for batch in x.split(size):
        observer.update(batch)
    for found, wanted in zip(observer.compute(), SampleMinMax().fit(x, grid), strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_cannot_work_is_refused() -> None:
    grid = activation_grid(4, signed=True, symmetric=False)
    with pytest.raises(ValueError, match="SampleMinMax is for activations"):
        SampleMinMax().fit(an_activation(), grid, channel_axis=0)
    with pytest.raises(ValueError, match="expected at least one update"):
        SampleMinMax().observer(grid).compute()
    with pytest.raises(ValueError, match="expected finite"):
        SampleMinMax().fit(torch.tensor([[float("nan"), 1.0]]), grid)
