"""Pixels: initial distributions, identity of the parameter, clamping; what is optimised at which rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthesis.generators import Conditional, Latents
from synthesis.seeding import seeded
from synthesis.sources import Pixels

SIZE = (3, 32, 32)


def shown(source: Pixels) -> Tensor:
    return source(seeded("latent"), torch.zeros(source.batch_size, 2)).detach()


@pytest.mark.parametrize(
    ("init", "mean", "std"), [("normal", 0, 1), ("uniform", 0.5, 12**-0.5), ("zeroq_legacy", 0, 0.0136)]
)
def test_initial_distribution(init: str, mean: float, std: float) -> None:
    source = Pixels(32, SIZE, init=init)  # type: ignore[arg-type]
    source.reset(seeded(0))
    images = shown(source)
    assert images.mean().item() == pytest.approx(mean, abs=0.02 * max(std, mean))
    assert images.std().item() == pytest.approx(std, rel=0.02)


def test_reset_is_in_place_and_a_function_of_the_generator() -> None:
    source = Pixels(2, SIZE)
    (group,) = source.parameter_groups()
    source.reset(seeded(0))
    first = shown(source).clone()
    source.reset(seeded(1))
    assert not torch.equal(shown(source), first)
    source.reset(seeded(0))
    assert torch.equal(shown(source), first)
    assert group["params"][0] is source.pixels


def test_latents_and_their_generator_have_rates_of_their_own() -> None:
    source = Latents(3, SIZE, latent=5, latent_lr=0.1, generator_lr=0.01)
    latents, generator = source.parameter_groups()
    assert (latents["lr"], generator["lr"]) == (0.1, 0.01)
    assert latents["params"] == [source.latents]
    assert source.latents.shape == (3, 5)
    assert {id(p) for p in generator["params"]} == {id(p) for p in source.generator.parameters()}
    together = [id(p) for group in (latents, generator) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in source.parameters())  # each once, none left out
    other = Latents(3, SIZE, latent_lr=0.3, generator_lr=0.02).parameter_groups()
    assert [group["lr"] for group in other] == [0.3, 0.02]


def test_one_step_moves_latents_and_generator_by_their_own_rate() -> None:
    source = Latents(4, SIZE, latent=5, latent_lr=0.1, generator_lr=0.01)
    source.reset(seeded(0))
    before = [[p.detach().clone() for p in group["params"]] for group in source.parameter_groups()]
    optimizer = torch.optim.Adam(source.parameter_groups(), lr=7.0)  # neither group takes the common rate
    source(seeded(1), torch.zeros(4, 2)).pow(3).sum().backward()
    optimizer.step()
    for group, olds, rate in zip(source.parameter_groups(), before, (0.1, 0.01), strict=True):
        largest = max(float((p.detach() - old).abs().max()) for p, old in zip(group["params"], olds, strict=True))
        assert largest == pytest.approx(rate, rel=1e-3)  # Adam's first step is its rate


def test_a_conditional_generator_leaves_its_rate_to_the_optimizer() -> None:
    source = Conditional(2, SIZE)
    source.bind(4, torch.nn.Linear(3, 4))
    (group,) = source.parameter_groups()
    assert set(group) == {"params"}
    assert len(group["params"]) == len(list(source.parameters()))


def test_clamp_by_channel() -> None:
    source = Pixels(2, SIZE, clamp=((-1.0, -0.5, 0.0), 0.1))
    source.reset(seeded(0))
    assert shown(source).amin((0, 2, 3)).tolist() == [-1.0, -0.5, 0.0]
    assert shown(source).max().item() == pytest.approx(0.1)


def test_valid_pixels_of_a_normalisation() -> None:
    mean, std = (0.2, 0.5, 0.9), (0.1, 0.2, 0.3)
    source = Pixels(16, SIZE, init="valid_uniform", valid=(mean, std))
    source.reset(seeded(0))
    pixels = shown(source) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert pixels.min().item() == pytest.approx(0, abs=1e-3)
    assert pixels.max().item() == pytest.approx(1, abs=1e-3)
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx([0.5] * 3, abs=0.01)
    with torch.no_grad():
        source.pixels.add_(100)
    source.constrain()
    assert shown(source).amax((0, 2, 3)).tolist() == pytest.approx([8, 2.5, 1 / 3])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="init: expected one of normal"):
        Pixels(2, SIZE, init="gauss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        Pixels(0, SIZE)
    with pytest.raises(ValueError, match="clamp, valid"):
        Pixels(1, SIZE, clamp=(0.0, 1.0), valid=((0.5,) * 3, (0.2,) * 3))
    with pytest.raises(ValueError, match="init: expected bounds"):
        Pixels(1, SIZE, init="valid_uniform")
