"""Hessians against torch's own convolutions, and the chain against solving each layer in the whole student."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.reconstruction import build_reconstruction
from quantizers.convert import Conversion
from quantizers.gptq import GPTQ
from quantizers.layer import float_mode, quantized_layers
from quantizers.nearest import Nearest, NearestActivation
from quantizers.obq import OBQ
from quantizers.ranges import MinMax
from reconstruction.closed_form import hessian, is_linear_in_unfolded_inputs, unfolded
from reconstruction.schedules import held_out, seed_of
from tests.reconstruction.students import images, resnet8, student_of

FIXED = partial(NearestActivation, range=MinMax())


def solved(conversion: Conversion, x: Tensor, **arguments: Any) -> list[dict[str, Any]]:
    settings = {"granularity": "layer", "phases": "closed_form", "iterations": 0, "seed": 0, "forward_batch_size": 16}
    module, _ = build_reconstruction(conversion=conversion, images=x, **(settings | arguments))
    assert not module.has_work
    return module.results


def gptq_student(network: nn.Module, x: Tensor, **options: Any) -> Conversion:
    return student_of(network, x, bits=(3, 8), weight=partial(GPTQ, range=MinMax(), **options), activation=FIXED)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(0, 2), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2),
        nn.Conv2d(4, 8, 3, groups=4, padding=1),
        nn.Conv2d(4, 2, 4, padding="same", dilation=2),
        nn.Conv2d(4, 2, 3, padding="valid"),
        nn.Conv2d(4, 2, 3, padding=2, padding_mode="reflect"),
        nn.Conv2d(4, 2, 3, padding=(1, 2), padding_mode="circular"),
        nn.Conv1d(4, 6, 5, padding=2, stride=3, groups=2),
        nn.Conv3d(4, 2, (1, 2, 3), padding=(0, 1, 1)),
        nn.Linear(7, 3),
    ],
    ids=repr,
)
def test_a_layer_is_its_weight_times_unfolded_inputs(layer: nn.Module) -> None:
    layer = layer.double()
    sizes = {nn.Conv1d: (4, 9), nn.Conv2d: (4, 9, 8), nn.Conv3d: (4, 4, 5, 6), nn.Linear: (7,)}
    x = torch.randn(3, *sizes[type(layer)], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = unfolded(layer, x)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    product = weight.reshape(len(X), -1, X.shape[1]) @ X  # (groups, outputs of a group, images x positions)
    y = layer(x)
    expected = y.transpose(0, 1).flatten(1)  # (outputs, images x positions)
    torch.testing.assert_close(product.flatten(0, 1) + bias[:, None], expected)  # type: ignore[index]
    torch.testing.assert_close(hessian(layer, x), 2 * X @ X.transpose(1, 2))


def test_the_hessian_is_the_same_however_many_images_are_unfolded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(4, 6, 3, groups=2), images(7, channels=4)
    whole = hessian(layer, x)
    monkeypatch.setattr("reconstruction.closed_form.ELEMENTS", 5000)
    torch.testing.assert_close(hessian(layer, x), whole, rtol=1e-12, atol=1e-12)
    assert whole.dtype == torch.float64
    tokens = torch.randn(2, 5, 7)  # a linear layer along the last axis
    torch.testing.assert_close(hessian(nn.Linear(7, 3), tokens), hessian(nn.Linear(7, 3), tokens.flatten(0, 1)))


def one_layer_after_the_other(conversion: Conversion, x: Tensor, schedule: str = "sequential") -> None:
    """The oracle: the whole student for each layer, its inputs taken by a hook, nothing cached.

    In parallel everything before a layer is float.
    """
    for _, layer in quantized_layers(conversion.student):
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad(), float_mode(conversion.student) if schedule == "parallel" else nullcontext():
            conversion.student(x)
        handle.remove()
        convolution = layer.layer
        if isinstance(convolution, nn.Conv2d):
            per_group = seen[0].double().chunk(convolution.groups, 1)
            kernel = {key: getattr(convolution, key) for key in ("dilation", "padding", "stride")}
            X = [nn.functional.unfold(part, convolution.kernel_size, **kernel).transpose(1, 2) for part in per_group]
        else:
            X = [seen[0].double()]
        rows = torch.stack([part.reshape(-1, part.shape[-1]) for part in X])
        assert isinstance(layer.weight_quantizer, GPTQ)
        layer.weight_quantizer.solve(layer.weight, 2 * rows.transpose(1, 2) @ rows)


class Separable(nn.Module):
    """A depthwise, a grouped and a strided convolution, a branch, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.strided = nn.Conv2d(8, 6, 3, stride=2, dilation=2, padding=2)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x).relu()
        x = self.strided((self.grouped(x) + x).relu()).relu()
        return self.linear(x.mean((2, 3)))


def separable() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Separable().eval()


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.parametrize(("build", "channels"), [(resnet8, 1), (separable, 4)])
def test_equals_solving_each_layer_in_the_whole_student(build: Any, channels: int, schedule: str) -> None:
    x = images(24, channels=channels)
    ours, oracle = gptq_student(build(), x), gptq_student(build(), x)
    rows = solved(ours, x, schedule=schedule)
    one_layer_after_the_other(oracle, x, schedule)
    pairs = zip(quantized_layers(ours.student), quantized_layers(oracle.student), strict=True)
    for (name, layer), (_, expected) in pairs:
        q, other = layer.weight_quantizer.rounded, expected.weight_quantizer.rounded  # type: ignore[union-attr]
        assert float((q != other).float().mean()) < 0.01, name  # a tie may fall the other way with the batch size
    assert len(rows) == len(list(quantized_layers(ours.student)))


@pytest.mark.parametrize(("build", "channels", "kind"), [(resnet8, 1, GPTQ), (separable, 4, GPTQ), (separable, 4, OBQ)])
def test_the_student_is_off_less_than_rounded_to_nearest(build: Any, channels: int, kind: Any) -> None:
    x = images(64, channels=channels)
    errors = []
    for weight in (kind, Nearest):
        conversion = student_of(build(), x, bits=(3, 8), weight=partial(weight, range=MinMax()), activation=FIXED)
        if weight is kind:
            solved(conversion, x)
        with torch.no_grad():
            errors.append(float((conversion.student(x) - conversion.reference(x)).square().mean()))
    assert errors[0] < 0.7 * errors[1]


def test_the_granularity_changes_the_rows_and_not_the_roundings() -> None:
    x = images(16)
    by_layer, by_block = gptq_student(resnet8(), x), gptq_student(resnet8(), x)
    rows = solved(by_layer, x)
    blocks = solved(by_block, x, granularity="block")
    assert len(rows) > len(blocks)
    for key, value in by_layer.student.state_dict().items():
        assert torch.equal(value, by_block.student.state_dict()[key]), key
    assert all(row["phase"] == "closed_form" for row in rows)
    assert sum(row["error_hard"] for row in blocks[1:]) < sum(row["error_nearest"] for row in blocks[1:])
    assert not any(p.requires_grad for p in by_layer.student.parameters())


def test_held_out_images_are_measured_but_not_solved_on() -> None:
    x = images(20)
    one, other = gptq_student(resnet8(), x), gptq_student(resnet8(), x)
    rows = solved(one, x, holdout=0.3)
    changed = x.clone()
    _, held = held_out(20, 0.3, seed=seed_of(0, "holdout"))
    changed[held] *= 3.0
    again = solved(other, changed, holdout=0.3)
    assert len(held) == 6
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.student.state_dict().values(), other.student.state_dict().values(), strict=True)
    )
    assert rows[-1]["error_hard"] == again[-1]["error_hard"]
    assert rows[-1]["error_hard_holdout"] != again[-1]["error_hard_holdout"]


def test_a_single_image_and_constant_images_are_finite() -> None:
    for x in (images(1), torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8)):
        conversion = gptq_student(resnet8(), x)
        rows = solved(conversion, x)
        assert all(torch.isfinite(t).all() for t in conversion.student.state_dict().values())
        assert all(torch.isfinite(torch.tensor(row["error_hard"])) for row in rows)


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


def test_what_is_no_plain_layer_stays_at_the_nearest(caplog: pytest.LogCaptureFixture) -> None:
    class Upsampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, 4, 3, padding=1)
            self.second = nn.ConvTranspose2d(4, 4, 2, stride=2)
            self.third = Padded(4, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x).relu()).relu()).mean((2, 3))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Upsampler().eval()
    x = images(12, channels=4)
    conversion = gptq_student(network, x)
    before = {
        name: copy.deepcopy(layer.weight_quantizer.state_dict()) for name, layer in quantized_layers(conversion.student)
    }
    solved(conversion, x)
    after = {name: layer.weight_quantizer.state_dict() for name, layer in quantized_layers(conversion.student)}
    assert not torch.equal(before["first"]["rounded"], after["first"]["rounded"])
    assert torch.equal(before["second"]["rounded"], after["second"]["rounded"])
    assert "ConvTranspose2d cannot be solved in closed form" in caplog.text
    assert not is_linear_in_unfolded_inputs(Padded(4, 3, 2))


def test_a_layer_that_runs_twice_is_solved_once_on_its_first_inputs() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Shared().eval()
        x = torch.randn(50, 6)
    conversion = gptq_student(network, x)
    rows = solved(conversion, x)
    alone = GPTQ(network.layer.weight.detach(), 8, range=MinMax())  # type: ignore[union-attr, operator]
    alone.solve(network.layer.weight.detach(), 2 * (x.double().T @ x.double())[None])  # type: ignore[union-attr, operator]
    assert len(rows) == 1
    assert torch.equal(conversion.student.layer.weight_quantizer.rounded, alone.rounded)  # type: ignore[union-attr]


def test_roundings_and_phases_that_do_not_go_together_are_refused() -> None:
    x = images(4)
    with pytest.raises(ValueError, match=r"expects a rounding that can be solved for.*got AdaRound"):
        solved(student_of(resnet8(), x), x)
    for phases in ("joint", "weights_then_activations", "none"):
        with pytest.raises(ValueError, match=f"expected 'closed_form' for GPTQ.*got '{phases}'"):
            solved(gptq_student(resnet8(), x), x, phases=phases, iterations=2)
