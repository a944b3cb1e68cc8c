"""Image generators: conditioning against a loop over samples, exact output moments, draws like torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks.image_generators import (
    ConditionalGenerator,
    ConditionalNorm,
    LatentGenerator,
    SuperposedGenerator,
    Trunk,
    upsampled_convolution,
)

K, LATENT = 5, 7
Labels = Tensor


def one_hot(count: int = 6) -> Labels:
    return F.one_hot(torch.arange(count) % K, K).float()


def every_generator(size: tuple[int, int, int]) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    z = torch.randn(6, LATENT, generator=torch.Generator().manual_seed(0))
    return [
        (LatentGenerator(size, latent=LATENT), (z,)),
        (ConditionalGenerator(size, K, latent=LATENT), (z, one_hot())),
        (ConditionalGenerator(size, K, latent=LATENT, conditioning="batch_norm"), (z, one_hot())),
        (SuperposedGenerator(size, torch.randn(K, LATENT), latent=3), (z, one_hot())),
        (SuperposedGenerator(size, torch.randn(K, LATENT), latent=LATENT), (z, one_hot())),
        (SuperposedGenerator(size, torch.randn(K, LATENT), latent=3, conditioning="batch_norm"), (z, one_hot())),
    ]


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (2, 9, 14)])
def test_images_have_the_size_asked_for_and_unit_moments(size: tuple[int, int, int]) -> None:
    for generator, inputs in every_generator(size):
        images = generator(*inputs)
        assert images.shape == (6, *size)
        torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(size[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(size[0]), atol=1e-2, rtol=0)
        generator.eval()
        torch.testing.assert_close(generator(*inputs), images)  # no running statistics


def test_reset_is_repeatable_in_place_and_changes_everything() -> None:
    for generator, inputs in every_generator((3, 8, 8)):
        kept = list(generator.parameters())
        generator.reset(torch.Generator().manual_seed(1))  # type: ignore[operator]
        first = generator(*inputs)
        with torch.no_grad():
            for parameter in kept:
                parameter.add_(1)
        generator.reset(torch.Generator().manual_seed(1))  # type: ignore[operator]
        assert all(a is b for a, b in zip(kept, generator.parameters(), strict=True))
        assert torch.equal(generator(*inputs), first)
        generator.reset(torch.Generator().manual_seed(2))  # type: ignore[operator]
        assert not torch.allclose(generator(*inputs), first)


def test_draws_have_the_distribution_of_torchs_own_initialisation() -> None:
    generator = ConditionalGenerator((3, 32, 32), K, latent=100)
    shapes = {name: p for name, p in generator.named_parameters() if p.numel() > 1000}
    fresh = {name: p.detach().clone() for name, p in shapes.items()}
    generator.reset(torch.Generator().manual_seed(0))
    assert len(shapes) == 5  # linear with its bias, three convolutions
    for name, parameter in shapes.items():
        assert float(parameter.detach().std()) == pytest.approx(float(fresh[name].std()), rel=0.05)
        assert float(parameter.detach().abs().max()) == pytest.approx(float(fresh[name].abs().max()), rel=0.05)
    assert generator.embedding is not None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_upsampled_convolution_against_torchs_interpolation_and_convolution(
    count: int, channels: int, out: int, height: int, width: int, bias: bool
) -> None:
    conv = nn.Conv2d(channels, out, 3, padding=1, bias=bias, dtype=torch.float64)
    x = torch.randn(count, channels, height, width, dtype=torch.float64, requires_grad=True)
    wanted = conv(F.interpolate(x, scale_factor=2))
    got = upsampled_convolution(x, conv)
    torch.testing.assert_close(got, wanted)
    learned = [x, *conv.parameters()]
    pull = torch.randn_like(wanted)
    for mine, reference in zip(
        torch.autograd.grad(got, learned, pull), torch.autograd.grad(wanted, learned, pull), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("middle", [False, True])
def test_trunk_against_the_published_order_of_layers(middle: bool) -> None:
    trunk = Trunk((3, 10, 8), LATENT, middle=middle).double()
    z = torch.randn(6, LATENT, dtype=torch.float64)
    x = trunk.norm0(trunk.linear(z).view(6, -1, 3, 2))
    if trunk.conv1 is not None and trunk.norm1 is not None:
        x = F.leaky_relu(trunk.norm1(trunk.conv1(F.interpolate(x, scale_factor=2))), 0.2)
    else:  # GENIE's: a convolution after each of the two upsamplings, and no other
        assert trunk.conv1 is trunk.norm1 is None
    x = F.interpolate(x, scale_factor=2)
    x = F.leaky_relu(trunk.norm2(trunk.conv2(x)), 0.2)
    if not middle:
        x = F.interpolate(x, scale_factor=2)
    torch.testing.assert_close(trunk(z), trunk.last(trunk.conv3(x)[:, :, :10, :8].tanh()))


def test_conditional_normalisation_against_a_loop_over_samples() -> None:
    norm = ConditionalNorm(4, K)
    with torch.no_grad():
        norm.scale.copy_(torch.randn(K, 4))
        norm.shift.copy_(torch.randn(K, 4))
    x = torch.randn(6, 4, 3, 3)
    plain = F.batch_norm(x, None, None, training=True)
    expected = torch.stack(
        [plain[i] * norm.scale[i % K][:, None, None] + norm.shift[i % K][:, None, None] for i in range(6)]
    )
    torch.testing.assert_close(norm(x, one_hot()), expected)
    halves = (one_hot() + one_hot().roll(1, 1)) / 2
    mixed = torch.stack(
        [
            plain[i] * (norm.scale[i % K] + norm.scale[(i + 1) % K])[:, None, None] / 2
            + (norm.shift[i % K] + norm.shift[(i + 1) % K])[:, None, None] / 2
            for i in range(6)
        ]
    )
    torch.testing.assert_close(norm(x, halves), mixed)


def test_embedding_multiplies_and_classifier_rows_add() -> None:
    z = torch.randn(6, LATENT)
    conditional = ConditionalGenerator((3, 8, 8), K, latent=LATENT)
    assert conditional.embedding is not None
    rows = conditional.embedding(torch.arange(6) % K)
    torch.testing.assert_close(conditional(z, one_hot()), conditional.trunk(z * rows))
    weight = torch.randn(K, LATENT)
    superposed = SuperposedGenerator((3, 8, 8), weight, latent=LATENT)
    mixed = (one_hot() + one_hot().roll(1, 1)) / 2
    entered = torch.stack([(weight[i % K] + weight[(i + 1) % K]) / 2 + z[i] for i in range(6)])
    normalised = F.batch_norm(entered, None, None, training=True)
    torch.testing.assert_close(superposed(z, mixed), superposed.trunk(normalised))
    reducing = SuperposedGenerator((3, 8, 8), weight, latent=3, conditioning="batch_norm")
    assert isinstance(reducing.reducer, nn.Linear)
    reduced = normalised @ reducing.reducer.weight.mT + reducing.reducer.bias
    torch.testing.assert_close(reducing(z, mixed), reducing.trunk(reduced, mixed))
    assert not any(parameter.shape == weight.shape for parameter in superposed.parameters())


def test_unknown_conditioning_is_refused() -> None:
    with pytest.raises(ValueError, match="conditioning: expected"):
        ConditionalGenerator((3, 8, 8), K, conditioning="none")  # type: ignore[arg-type]
