"""Sensitivities against students that are converted anew for every single one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocation.groups import Choice, bits_of, choices_of, find_groups
from allocation.hardware import Hardware
from allocation.hessian import average_traces
from allocation.sensitivity import HessianSensitivity, LayerSensitivity, OutputSensitivity, Probe
from allocation.swaps import Swaps
from quantizers.convert import BitWidths
from quantizers.layer import QuantizedLayer, quantized_layers, sites
from tests.allocation.networks import PLAIN, images, student, tied

PAIRS = [(w, a) for w in (2, 4) for a in (3, 8)]
LABELS = torch.arange(12) % 5


def probe(pairs: list[tuple[int, int]] = PAIRS, base: int | None = None, **options: Any) -> Probe:
    conversion = student()
    groups = find_groups(conversion)

    def choose(chosen: list[tuple[int, int]]) -> list[list[Choice]]:
        return choices_of(groups, conversion, PLAIN, BitWidths(4, 4), pairs=chosen, hardware=Hardware("any"))

    everywhere = [path for group in groups for path in group.layers]
    wanted = {*pairs, *([(base, base)] if base else [])}
    students = [student(allocation=dict.fromkeys(everywhere, pair)).student for pair in sorted(wanted)]
    at_base = [own[0] for own in choose([(base, base)])] if base else None
    with torch.no_grad():
        answers = tied()(images())
    fields = {"labels": LABELS, "batch_size": 5} | options
    return Probe(
        swaps=Swaps(students, groups, at_base),
        choices=choose(pairs),
        reference=conversion.reference,
        images=images(),
        answers=answers,
        **fields,
    )


def only(found: Probe, index: int, choice: Choice) -> nn.Module:
    """A student converted with this choice, in which only this group is switched on."""
    group = found.swaps.groups[index]
    made = student(allocation=dict.fromkeys(group.layers, choice.pair)).student
    for path, layer in quantized_layers(made):
        layer.enabled = path in group.layers
    for path, site in sites(made):
        site.enabled = path in group.sites
    return made


HARM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda z, t: (t.softmax(1) * (t.softmax(1).log() - z.softmax(1).log())).sum(1),
    "mse": lambda z, t: ((z - t) ** 2).mean(1),
    "sqnr": lambda z, t: ((z - t) ** 2).sum(1) / (t**2).sum(1),
    "loss": lambda z, t: torch.stack([-row.softmax(0)[label].log() for row, label in zip(z, LABELS, strict=True)]),
}


def test_a_swap_is_a_student_with_one_group_switched_on() -> None:
    found = probe()
    for index, own in enumerate(found.choices):
        with torch.no_grad():
            outputs = [only(found, index, choice)(images()) for choice in own]
        for measure, harm_of in HARM.items():
            harm = OutputSensitivity(measure).of_group(found, index)
            expected = torch.stack([harm_of(z, found.answers) for z in outputs])
            torch.testing.assert_close(harm, expected, atol=1e-6, rtol=1e-4)


def test_with_a_base_the_rest_has_its_width() -> None:
    found = probe(base=8)
    index = [group.name for group in found.swaps.groups].index("conv2")
    bits = bits_of(found.swaps.groups, [c[0] for c in [[Choice((8, 8), (), ())]] * len(found.choices)])
    for row, choice in zip(OutputSensitivity("mse", 8).of_group(found, index), found.choices[index], strict=True):
        made = student(allocation=bits | {"conv2": choice.pair}).student
        with torch.no_grad():
            torch.testing.assert_close(row, HARM["mse"](made(images()), found.answers), atol=1e-6, rtol=1e-4)
    base = OutputSensitivity("mse", 8).baseline(found)
    with torch.no_grad():
        expected = HARM["mse"](student(allocation=bits).student(images()), found.answers)
    torch.testing.assert_close(base, expected, atol=1e-6, rtol=1e-4)
    assert OutputSensitivity("kl").baseline(probe()).abs().max() < 1e-6  # a float base does no harm


def test_around_an_assignment_the_rest_is_as_assigned() -> None:
    found = probe()
    chosen = [i % len(own) for i, own in enumerate(found.choices)]
    found.swaps.base = [own[i] for own, i in zip(found.choices, chosen, strict=True)]
    index = 1
    harm = OutputSensitivity("kl").of_group(found, index)
    for i in range(len(found.choices[index])):
        whole = [own[i if g == index else k] for g, (own, k) in enumerate(zip(found.choices, chosen, strict=True))]
        found.swaps.assign(whole)
        outputs = found.swaps.run(found.images, 5)
        expected = F.kl_div(outputs.log_softmax(1), found.answers.log_softmax(1), reduction="none", log_target=True)
        torch.testing.assert_close(harm[i], expected.sum(1), atol=1e-6, rtol=1e-4)


def test_an_assignment_is_the_converted_student() -> None:
    found = probe()
    for pick in (0, -1):
        chosen = [own[pick] for own in found.choices]
        found.swaps.assign(chosen)
        made = student(allocation=bits_of(found.swaps.groups, chosen)).student
        with torch.no_grad():
            assert torch.equal(found.swaps.run(images(), 5), torch.cat([made(b) for b in images().split(5)]))


def test_layer_errors_are_those_of_the_layers_outputs() -> None:
    found = probe()
    index = [group.name for group in found.swaps.groups].index("conv1")  # and the shortcut
    harm = LayerSensitivity().of_group(found, index)
    network, seen = tied(), []
    for path in found.swaps.groups[index].layers:
        network.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    with torch.no_grad():
        network(images(5))
    for row, choice in zip(harm, found.choices[index], strict=True):
        made, own = only(found, index, choice), []
        for path in found.swaps.groups[index].layers:
            made.get_submodule(path).register_forward_hook(lambda m, i, o, own=own: own.append(o))
        with torch.no_grad():
            made(images(5))
        ratios = [(a - b).square().flatten(1).mean(1) / b.square().mean() for a, b in zip(own, seen, strict=True)]
        torch.testing.assert_close(row[:5], torch.stack(ratios).sum(0), atol=1e-6, rtol=1e-4)


def test_traces_are_those_of_the_whole_hessian() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = torch.randn(5, 6)
    names = ["1.weight", "3.weight"]
    target = network(batch).detach().softmax(1)

    def loss(*weights: Tensor) -> Tensor:
        outputs = torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (batch,))
        return -(target * F.log_softmax(outputs, 1)).sum(1).mean()

    weights = tuple(network.get_parameter(name).detach() for name in names)
    blocks = torch.autograd.functional.hessian(loss, weights)
    found = average_traces(network, ["1", "3"], batch, batch_size=2, probes=600, seed=0)
    for i, (layer, weight) in enumerate(zip(("1", "3"), weights, strict=True)):
        exact = blocks[i][i].reshape(weight.numel(), -1).trace() / weight.numel()
        assert float(found[layer].mean()) == pytest.approx(float(exact), rel=0.15)


def test_hawq_sums_squared_errors_and_does_not_average_them() -> None:
    """A mean over the weights would make large layers look harmless."""
    found = probe([(2, 4), (4, 4)])
    sensitivity = HessianSensitivity(probes=3)
    traces = average_traces(
        found.reference, [p for g in found.swaps.groups for p in g.layers], images(), batch_size=5, probes=3, seed=0
    )
    for group, own, harm in zip(found.swaps.groups, found.choices, sensitivity.of_all(found), strict=True):
        for row, choice in zip(harm, own, strict=True):
            expected = torch.zeros(3)
            for path in group.layers:
                layer = student(allocation={path: choice.pair}).student.get_submodule(path)
                assert isinstance(layer, QuantizedLayer)
                error = layer.quantized_weight() - layer.weight
                expected += traces[path] / 2 * float((error**2).sum())
            torch.testing.assert_close(row, expected, atol=1e-9, rtol=1e-3)
    with pytest.raises(ValueError, match=r"one activation width, got \[3, 8\]"):
        sensitivity.of_all(probe())


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of kl, mse, sqnr, loss, got 'l1'"):
        OutputSensitivity("l1")
    with pytest.raises(ValueError, match="at least 1 random vector"):
        HessianSensitivity(0)
    with pytest.raises(ValueError, match="choose kl, which needs no labels"):
        OutputSensitivity("loss").of_group(probe(labels=None), 0)


@pytest.mark.parametrize("sensitivity", [OutputSensitivity("kl"), LayerSensitivity(), OutputSensitivity("sqnr")])
def test_dead_channels_constant_inputs_and_one_image_give_finite_numbers(sensitivity: Any) -> None:
    found = probe()
    for network in (found.swaps.student, found.reference):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.zero_()
    single = Probe(
        swaps=found.swaps,
        choices=found.choices,
        reference=found.reference,
        images=torch.ones(1, 3, 8, 8),
        answers=torch.zeros(1, 5),
    )
    assert all(harm.isfinite().all() for harm in sensitivity.of_all(single))
