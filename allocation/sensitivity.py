"""How much a network suffers from one group at a few bits, while the rest stays as it is.

Hubara et al., ICML 2021, arXiv 2006.10518, section 3.4, measure the loss on labelled images; without labels the
divergence from the teacher's predictions takes its place. HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852)
multiplies the average trace of the Hessian and the squared error of the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allocation.groups import Choice
from allocation.hessian import average_traces
from allocation.swaps import Swaps
from quantizers.layer import QuantizedLayer, output_first
from quantizers.protocol import FLOAT


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """What sensitivities are measured on.

    Attributes:
        swaps: the student.
        choices: the options of each group.
        reference: the float network of the same layers.
        images: (N, C, H, W), normalised.
        answers: (N, K), the teacher's outputs on them.
        labels: (N,), where known.
        batch_size: images at a time.
        seed: of what is drawn.
    """

    swaps: Swaps
    choices: Sequence[Sequence[Choice]]
    reference: nn.Module
    images: Tensor
    answers: Tensor
    labels: Tensor | None = None
    batch_size: int = 64
    seed: int = 0


class Sensitivity(ABC):
    """A measure of harm: for each option of a group one number a sample, of which the mean counts."""

    base: int | None = None  # bits of the groups that are not exchanged; None: float
    needs_labels = False
    separable = True  # whether groups are measured one by one, so that several jobs can share the work

    @abstractmethod
    def baseline(self, probe: Probe) -> Tensor:
        """The harm (S,) of the base alone."""

    @abstractmethod
    def of_group(self, probe: Probe, index: int) -> Tensor:
        """The harm (options, S) of each option of a group."""

    def of_all(self, probe: Probe) -> list[Tensor]:
        """`of_group` of every group."""
        return [self.of_group(probe, index) for index in range(len(probe.choices))]


def divergence(outputs: Tensor, answers: Tensor, labels: Tensor | None = None) -> Tensor:
    """KL(teacher || network) in nats, (B,)."""
    return F.kl_div(outputs.log_softmax(1), answers.log_softmax(1), reduction="none", log_target=True).sum(1)


def squared_error(outputs: Tensor, answers: Tensor, labels: Tensor | None = None) -> Tensor:
    """Mean squared difference of the outputs, (B,)."""
    return (outputs - answers).square().mean(1)


def noise_to_signal(outputs: Tensor, answers: Tensor, labels: Tensor | None = None) -> Tensor:
    """Squared error over squared output, (B,): 10^(-SQNR / 10) of a signal-to-noise ratio in decibels."""
    return (outputs - answers).square().sum(1) / answers.square().sum(1).clamp(min=1e-12)


def labelled_loss(outputs: Tensor, answers: Tensor, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy in nats, (B,), as in the paper."""
    assert labels is not None
    return F.cross_entropy(outputs, labels, reduction="none")


MEASURES: dict[str, Callable[..., Tensor]] = {
    "kl": divergence,
    "mse": squared_error,
    "sqnr": noise_to_signal,
    "loss": labelled_loss,
}


class OutputSensitivity(Sensitivity):
    """Harm to the network's outputs.

    Args:
        measure: "kl": divergence from the teacher; "mse": squared error of the outputs; "sqnr": the same relative to
            the outputs; "loss": cross-entropy on labelled images.
        base: bits of the rest of the network (the paper: 8); None: float.

    Raises:
        ValueError: if the measure is unknown.
    """

    def __init__(self, measure: str = "kl", base: int | None = None) -> None:
        if measure not in MEASURES:
            raise ValueError(f"allocation.sensitivity.measure: expected one of {', '.join(MEASURES)}, got {measure!r}")
        self.measure = measure
        self.base = base
        self.needs_labels = measure == "loss"

    def baseline(self, probe: Probe) -> Tensor:
        """See `Sensitivity.baseline`."""
        probe.swaps.reset()
        return self._harm(probe, probe.swaps.run(probe.images, probe.batch_size))

    def of_group(self, probe: Probe, index: int) -> Tensor:
        """See `Sensitivity.of_group`."""
        batches = list(probe.swaps.outputs(index, probe.choices[index], probe.images, probe.batch_size))
        return torch.stack([self._harm(probe, torch.cat(parts).cpu()) for parts in zip(*batches, strict=True)])

    def _harm(self, probe: Probe, outputs: Tensor) -> Tensor:
        if self.needs_labels and probe.labels is None:
            raise ValueError(
                "allocation.sensitivity.measure: 'loss' expects images with labels (calibration=real), got none; "
                "choose kl, which needs no labels"
            )
        return MEASURES[self.measure](outputs, probe.answers, probe.labels)


class LayerSensitivity(Sensitivity):
    """The error of the layers' own outputs, relative to their mean square: what reconstruction measures (BRECQ)."""

    def baseline(self, probe: Probe) -> Tensor:
        """Nothing: the errors are differences from the base."""
        return torch.zeros(len(probe.images))

    def of_group(self, probe: Probe, index: int) -> Tensor:
        """The sum over the group's layers."""
        errors: list[list[Tensor]] = [[] for _ in probe.choices[index]]
        for exact, options in probe.swaps.layer_outputs(index, probe.choices[index], probe.images, probe.batch_size):
            for found, outputs in zip(errors, options, strict=True):
                pairs = zip(outputs, exact, strict=True)
                found.append(torch.stack([_relative(a, b) for a, b in pairs]).sum(0).cpu())
        return torch.stack([torch.cat(found) for found in errors])


def _relative(outputs: Tensor, exact: Tensor) -> Tensor:  # (B, ...) each
    signal = exact.square().mean().clamp(min=1e-12)
    return (outputs - exact).square().flatten(1).mean(1) / signal


class HessianSensitivity(Sensitivity):
    """Half the average trace of the Hessian times the summed squared error of the weights (HAWQ-V2).

    The Hessian is that of the divergence from the network's own predictions, so no label is needed. Samples are the
    random vectors of Hutchinson's estimate, not images. It says nothing about activations.

    Args:
        probes: random vectors.
    """

    separable = False

    def __init__(self, probes: int = 16) -> None:
        if probes < 1:
            raise ValueError(f"allocation.sensitivity.probes: expected at least 1 random vector, got {probes}")
        self.probes = probes

    def baseline(self, probe: Probe) -> Tensor:
        """Nothing: the errors are those of the float weights."""
        return torch.zeros(self.probes)

    def of_group(self, probe: Probe, index: int) -> Tensor:
        """See `of_all`, which needs no longer."""
        return self.of_all(probe)[index]

    def of_all(self, probe: Probe) -> list[Tensor]:
        """See `Sensitivity.of_all`.

        Raises:
            ValueError: if there are activation widths to choose between.
        """
        for group, own in zip(probe.swaps.groups, probe.choices, strict=True):
            if len({choice.sites for choice in own}) > 1:
                raise ValueError(
                    "allocation.sensitivity: the Hessian of weights expects one activation width, got "
                    f"{sorted({choice.pair[1] for choice in own})} for {group.name}; leave allocation.activation_bits "
                    "null, or choose allocation.sensitivity._target_=allocation.sensitivity.OutputSensitivity"
                )
        layers = [layer for group in probe.swaps.groups for layer in group.layers]
        traces = average_traces(
            probe.reference, layers, probe.images, batch_size=probe.batch_size, probes=self.probes, seed=probe.seed
        )
        return [self._errors(probe, index, traces) for index in range(len(probe.choices))]

    @torch.no_grad()
    def _errors(self, probe: Probe, index: int, traces: dict[str, Tensor]) -> Tensor:
        group, student = probe.swaps.groups[index], probe.swaps.student
        found = []
        for choice in probe.choices[index]:
            harm = torch.zeros(self.probes)
            for path, (bits, _) in zip(group.layers, choice.layers, strict=True):
                layer = student.get_submodule(path)
                if bits != FLOAT and isinstance(layer, QuantizedLayer):
                    weight, quantizer = output_first(layer.layer), probe.swaps.quantizers[path, bits]
                    assert quantizer is not None
                    error = (quantizer(weight) - weight).square().sum().cpu()
                    harm += 0.5 * traces[path] * error
            found.append(harm)
        return torch.stack(found)
