"""What every option of conf/weight and conf/activation must keep; a new yaml is held to it without a new test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from quantizers.base import Quantizer
from tests.configuration import CONF, options

WEIGHTS, ACTIVATIONS = options("weight"), options("activation")


def factory(group: str, option: str) -> Any:
    return instantiate(OmegaConf.load(CONF / group / f"{option}.yaml"))


def a_weight() -> Tensor:
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0  # a dead channel
    weight[3] = 0.7  # a constant one
    return weight * torch.logspace(-3, 1, 6).view(-1, 1, 1, 1)


def levels(values: Tensor) -> int:
    return max(len(channel.unique()) for channel in values.flatten(1))


def learn_a_little(quantizer: Quantizer, x: Tensor) -> None:
    groups = [{"params": group["params"], "lr": 100 * group["lr"]} for group in quantizer.parameter_groups()]
    if not groups:
        return
    optimizer = torch.optim.Adam(groups)
    for step in range(5):
        optimizer.zero_grad()
        ((quantizer(x) - x).square().sum() + 0.1 * quantizer.regularizer(step / 5)).backward()
        optimizer.step()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("option", WEIGHTS)
class TestWeights:
    def test_hardened_weights_have_at_most_two_to_the_bits_levels(self, option: str, bits: int) -> None:
        weight = a_weight()
        quantizer = factory("weight", option)(weight, bits)
        learn_a_little(quantizer, weight)
        quantizer.harden()
        assert levels(quantizer(weight).detach()) <= 2**bits

    def test_hardening_twice_is_hardening_once(self, option: str, bits: int) -> None:
        weight = a_weight()
        quantizer = factory("weight", option)(weight, bits)
        learn_a_little(quantizer, weight)
        quantizer.harden()
        once = quantizer(weight).detach().clone()
        quantizer.harden()
        assert torch.equal(quantizer(weight), once)
        assert quantizer.soft_fraction() == 0.0

    def test_integers_reproduce_the_hardened_weights_bit_for_bit(self, option: str, bits: int) -> None:
        weight = a_weight()
        quantizer = factory("weight", option)(weight, bits)
        learn_a_little(quantizer, weight)
        quantizer.harden()
        q, scale, zero_point = quantizer.integers(weight)
        assert q.dtype == torch.int32
        assert torch.equal((q - zero_point) * scale, quantizer(weight))
        assert int(q.max()) - int(q.min()) < 2**bits

    def test_rescaled_channels_keep_their_integers(self, option: str, bits: int) -> None:
        weight = a_weight()
        quantizer = factory("weight", option)(weight, bits)
        learn_a_little(quantizer, weight)
        quantizer.harden()
        q, scale, zero_point = quantizer.integers(weight)
        factor = torch.tensor([2.0, 1.0, 2.0, 4.0, 16.0, 8.0])  # powers of two, so that nothing rounds
        quantizer.rescale(factor)
        moved = factor.view(-1, 1, 1, 1)
        after = quantizer.integers(weight * moved)
        assert torch.equal(after[0], q)
        assert torch.equal(after[1], scale * moved)
        assert torch.equal(after[2], zero_point)

    def test_everything_is_finite(self, option: str, bits: int) -> None:
        for weight in (a_weight(), torch.zeros(2, 1, 3, 3), torch.ones(1, 1), torch.full((2, 2), 1e-30)):
            quantizer = factory("weight", option)(weight, bits)
            out = quantizer(weight)
            out.sum().backward() if out.requires_grad else None
            gradients = [p.grad for p in quantizer.parameters() if p.grad is not None]
            assert all(t.isfinite().all() for t in (out, quantizer.scale, *gradients))

    def test_a_state_dict_carries_all_of_it(self, option: str, bits: int) -> None:
        weight = a_weight()
        trained, fresh = factory("weight", option)(weight, bits), factory("weight", option)(weight, bits)
        learn_a_little(trained, weight)
        trained.harden()
        fresh.load_state_dict(trained.state_dict())
        assert torch.equal(fresh(weight), trained(weight))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("option", ACTIVATIONS)
class TestActivations:
    def activation(self, signed: bool) -> Tensor:
        x = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(1))
        return x if signed else x.relu()

    def test_levels_and_idempotence(self, option: str, bits: int, signed: bool) -> None:
        x = self.activation(signed)
        quantizer = factory("activation", option)(bits, signed=signed)
        quantizer.initialize(x)
        out = quantizer(x).detach()
        assert len(out.unique()) <= 2**bits
        assert torch.equal(quantizer(out), out)

    def test_streaming_range_is_a_range_of_the_data(self, option: str, bits: int, signed: bool) -> None:
        x = self.activation(signed)
        quantizer = factory("activation", option)(bits, signed=signed)
        observer = quantizer.range.observer(quantizer.grid)
        for batch in x.split(1):
            observer.update(batch)
        quantizer.set_range(*observer.compute())
        streamed = (quantizer(x) - x).square().mean()
        quantizer.initialize(x)
        assert streamed <= 1.2 * (quantizer(x) - x).square().mean() + 1e-6

    def test_constants_are_finite(self, option: str, bits: int, signed: bool) -> None:
        for value in (0.0, 3.0, 1e-20):
            quantizer = factory("activation", option)(bits, signed=signed)
            quantizer.initialize(torch.full((2, 2), value))
            assert quantizer(torch.full((2, 2), value)).isfinite().all()
