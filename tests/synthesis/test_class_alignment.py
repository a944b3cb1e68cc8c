"""Centres are the moments of the class's images; the two losses are means over deep layers of what the paper states."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synthesis.class_alignment import ClassAlignment, ClassCentres, class_centres, first_deep_layer
from synthesis.look import look_through
from synthesis.moments import Moments, Probe
from synthesis.seeding import seeded
from synthesis.statistics import execution_order
from tests.reconstruction.students import images, resnet8

SIZES = [2, 3, 4, 1, 2, 3, 5, 2]  # 8 layers: deep from int(9 / 2) - 2 = 2
CHANNELS = sum(SIZES)


def centres(*, trusted: tuple[bool, ...] = (True, True, False), known: tuple[bool, ...] = (True, True, True)) -> Any:
    g = torch.Generator().manual_seed(0)
    moments = Moments(torch.randn(3, CHANNELS, generator=g), torch.rand(3, CHANNELS, generator=g) + 0.1)
    return ClassCentres(moments, torch.tensor(known), torch.tensor(trusted))


def seen(seed: int = 1) -> Moments:
    g = torch.Generator().manual_seed(seed)
    return Moments(torch.randn(1, CHANNELS + 1, generator=g), torch.rand(1, CHANNELS + 1, generator=g))


def layerwise(values: Moments, goal: Moments, *, first: int = 2) -> float:
    """mean_l [ MSE + MSE ], layer by layer, from the layer `first` on."""
    total, start = 0.0, 0
    for index, size in enumerate(SIZES):
        part = slice(start, start + size)
        if index >= first:
            total += float(
                F.mse_loss(values.mean[part], goal.mean[part]) + F.mse_loss(values.var[part], goal.var[part])
            )
        start += size
    return total / (len(SIZES) - first)


@pytest.mark.parametrize(("layers", "first"), [(20, 8), (27, 12), (52, 24), (53, 25), (2, 0), (7, 2)])
def test_deep_layers_are_those_of_the_released_code(layers: int, first: int) -> None:
    assert first_deep_layer(layers) == first


class Recorder:
    """What enters each BatchNorm, by hooks of our own."""

    def __init__(self, network: torch.nn.Module, names: list[str]) -> None:
        self.inputs: dict[str, Tensor] = {}
        for name in names:
            network.get_submodule(name).register_forward_pre_hook(partial(self.keep, name))

    def keep(self, name: str, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.inputs[name] = arguments[0].detach()


def test_centres_are_the_moments_that_batch_normalisation_computes_of_the_class() -> None:
    network, x, labels = resnet8(), images(7), torch.tensor([3, 1, 3, 0, 3, 1, 9])
    layers = list(execution_order(network, (1, 8, 8)))
    look = look_through(network, x, layers, probe=Probe("sample"), site="bn_input")
    everything_right = F.one_hot(labels, 10).float()
    found = class_centres(look.moments, labels, everything_right)
    record = Recorder(network, layers)
    for label in (0, 1, 3, 9):
        network(x[labels == label])
        start = 0
        for name in layers:
            entered = record.inputs[name]
            mean, var = torch.zeros(entered.shape[1]), torch.zeros(entered.shape[1])
            F.batch_norm(entered, mean, var, training=True, momentum=1.0)
            count = entered.numel() // entered.shape[1]
            part = slice(start, start := start + entered.shape[1])
            torch.testing.assert_close(found.moments.mean[label, part], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.moments.var[label, part], var * (count - 1) / count, rtol=1e-4, atol=1e-5)


def test_misclassified_images_count_only_where_there_are_no_others() -> None:
    mean = torch.tensor([[1.0], [5.0], [7.0]])
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # right, wrong, wrong
    found = class_centres(Moments(mean, torch.ones(3, 1)), torch.tensor([0, 0, 1]), logits)
    assert found.moments.mean.flatten().tolist() == [1.0, 7.0]
    assert found.known.tolist() == [True, True]
    assert found.trusted.tolist() == [True, False]


def test_missing_classes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = class_centres(Moments(torch.ones(1, 2), torch.ones(1, 2)), torch.tensor([1]), torch.eye(4)[1:2])
    assert "3 of 4 classes" in caplog.text
    assert "[0, 2, 3]" in caplog.text
    assert found.known.tolist() == [False, True, False, False]
    assert ClassAlignment(found, [1, 1]).draw(seeded(0), untrusted=True) == 1


def test_labels_that_are_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: expected at least one, from 0 to 3"):
        class_centres(Moments(torch.ones(1, 2), torch.ones(1, 2)), torch.tensor([4]), torch.zeros(1, 4))


def test_central_loss_is_the_layerwise_oracle() -> None:
    made, now = ClassAlignment(centres(), SIZES, central=0.05, distorted=0.0), seen()
    terms = made(now, 1, seeded(0))
    assert set(terms) == {"central"}
    goal = Moments(*(t[1] for t in centres().moments))
    expected = 0.05 * layerwise(Moments(now.mean[0, :-1], now.var[0, :-1]), goal)
    assert float(terms["central"]) == pytest.approx(expected, rel=1e-5)


def noises(relative: bool, draws: int = 3000) -> Moments:
    """The noise behind D, recovered from the gradient: d/dm (m - mu - e)^2 / (C_l L) at m = mu."""
    made = ClassAlignment(centres(), SIZES, central=0.0, distorted=1.0, relative=relative)
    moments = Moments(*(t[1:2].clone().requires_grad_() for t in centres().moments))
    found: list[Moments] = []
    scale = torch.cat([torch.full((size,), float(size)) for size in SIZES]) * (len(SIZES) - 2) / -2
    for draw in range(draws):
        grads = torch.autograd.grad(made(moments, 1, seeded(0, draw))["distorted"], list(moments))
        found.append(Moments(*(grad[0] * scale for grad in grads)))
    return Moments(*(torch.stack(column) for column in zip(*found, strict=True)))


@pytest.mark.parametrize("relative", [False, True])
def test_noise_has_the_stated_deviation_and_is_drawn_anew(relative: bool) -> None:
    found, start = noises(relative), 0
    var = centres().moments.var[1]
    for index, size in enumerate(SIZES):
        part = slice(start, start := start + size)
        deviation = float(var[part].mean().sqrt()) if relative else 1.0
        expected = (0.5 * deviation, 1.0 * deviation**2) if index >= 2 else (0.0, 0.0)
        for noise, std in zip(found, expected, strict=True):
            assert noise[:, part].mean(0).tolist() == pytest.approx([0.0] * size, abs=0.1)
            assert noise[:, part].std(0).tolist() == pytest.approx([std] * size, rel=0.06, abs=1e-6)


def test_an_untrusted_class_is_drawn_to_noise_alone_in_all_layers() -> None:
    made, now = ClassAlignment(centres(), SIZES, distorted=0.9, central=0.05), seen()
    goal = Moments(*torch.randn(2, CHANNELS, generator=seeded(5)))
    expected = 2 * 0.9 * layerwise(Moments(now.mean[0, :-1], now.var[0, :-1]), goal, first=0)
    terms = made(now, 2, seeded(5))
    assert set(terms) == {"distorted"}
    assert float(terms["distorted"]) == pytest.approx(expected, rel=1e-5)
    assert ClassAlignment(centres(), SIZES, distorted=0.0)(now, 2, seeded(5)) == {}


def test_untrusted_classes_are_drawn_only_if_asked_for() -> None:
    made = ClassAlignment(centres(known=(True, False, True), trusted=(True, False, False)), SIZES)
    assert {made.draw(seeded(i), untrusted=True) for i in range(40)} == {0, 2}
    assert {made.draw(seeded(i), untrusted=False) for i in range(40)} == {0}


def test_dead_channels_are_finite() -> None:
    still = ClassCentres(Moments(*torch.zeros(2, 3, CHANNELS)), *torch.ones(2, 3, dtype=torch.bool))
    now = Moments(*(t.requires_grad_() for t in torch.zeros(2, 1, CHANNELS)))
    for relative in (False, True):
        loss = sum(ClassAlignment(still, SIZES, relative=relative)(now, 0, seeded(0)).values())
        assert isinstance(loss, Tensor)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, list(now)))


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [({"central": -1.0}, SIZES, "central: expected"), ({}, [3], "sizes: expected 22 channels in all, got 3")],
)
def test_bad_arguments_are_named(changes: dict[str, Any], sizes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassAlignment(centres(), sizes, **changes)
