"""Element-wise dropping of quantization."""

from __future__ import annotations

import pytest
import torch

from quantizers.qdrop import qdrop, random_mask

X, QUANTIZED = torch.randn(100, 100), torch.randn(100, 100)


def test_the_ends_are_exact() -> None:
    assert torch.equal(qdrop(QUANTIZED, X, 0.0), QUANTIZED)
    assert torch.equal(qdrop(QUANTIZED, X, 1.0), X)


def test_each_element_is_one_of_the_two_at_the_stated_rate() -> None:
    mixed = qdrop(QUANTIZED, X, 0.3, torch.Generator().manual_seed(0))
    kept = mixed == X
    assert torch.equal(torch.where(kept, X, QUANTIZED), mixed)
    assert kept.float().mean().item() == pytest.approx(0.3, abs=0.02)
    # Element-wise: no row or column shares its draw.
    assert 0.05 < kept.float().mean(0).min() <= kept.float().mean(0).max() < 0.6
    assert 0.05 < kept.float().mean(1).min() <= kept.float().mean(1).max() < 0.6


def test_the_draw_is_the_generators_and_fresh_each_time() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = qdrop(QUANTIZED, X, 0.5, generator), qdrop(QUANTIZED, X, 0.5, generator)
    again = qdrop(QUANTIZED, X, 0.5, torch.Generator().manual_seed(3))
    expected = random_mask(X, 0.5, torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.where(expected, X, QUANTIZED))


def test_gradients_go_to_what_was_taken() -> None:
    x, quantized = X.clone().requires_grad_(), QUANTIZED.clone().requires_grad_()
    mixed = qdrop(quantized, x, 0.5, torch.Generator().manual_seed(0))
    mixed.sum().backward()
    assert torch.equal(x.grad, (mixed == X).float())
    assert torch.equal(quantized.grad, 1 - x.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_against_torchs_where_values_and_gradients(dtype: torch.dtype, layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(1)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max], dtype=dtype)
    draws = torch.randn(3, 64 * 3 * 9 * 9, generator=generator).to(dtype)
    for row in draws:  # in places of its own, so that each meets ordinary numbers
        row[torch.randperm(len(row), generator=generator)[:600]] = special.repeat(100)
    x, quantized, upstream = (row.view(64, 3, 9, 9).contiguous(memory_format=layout) for row in draws)
    leaves = [t.clone().requires_grad_() for t in (x, quantized, x, quantized)]
    mixed = qdrop(leaves[1], leaves[0], 0.5, torch.Generator().manual_seed(0))
    expected = torch.where(random_mask(x, 0.5, torch.Generator().manual_seed(0)), leaves[2], leaves[3])
    mixed.backward(upstream)
    expected.backward(upstream)
    pairs = [(mixed, expected), (leaves[0].grad, leaves[2].grad), (leaves[1].grad, leaves[3].grad)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours.signbit(), theirs.signbit())


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_other_probabilities_are_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="probability: expected a share from 0 to 1"):
        qdrop(QUANTIZED, X, probability)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="quantized: expected the shape of x"):
        qdrop(QUANTIZED[:1], X, 0.5)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_every_bit_of_a_draw_is_fair_and_independent(probability: float) -> None:
    mask = random_mask(torch.empty(80_001), probability, torch.Generator().manual_seed(0))
    assert mask.shape == (80_001,)
    # By position inside the eight bytes of a word: none is biased (the sign bit of a word is drawn too).
    rates = mask[:80_000].view(-1, 8).float().mean(0)
    assert (rates - probability).abs().max() < 0.02
    pairs = torch.corrcoef(mask[:80_000].view(-1, 8).float().T) if 0 < probability < 1 else torch.eye(8)
    assert (pairs - torch.eye(8)).abs().max() < 0.05
