"""Target moments from the weights alone, for networks without BatchNorm.

`WeightGaussian`: Sharma, Abraham, Rajendiran, "A Generalized Zero-Shot Quantization of Deep Convolutional Neural
Networks via Learned Weights Statistics" (GZSQ), IEEE TMM 2021, arXiv 2112.02834. Not settled by it, and chosen here:
statistics of weights by output channel, and which layer another one follows (see `synthesis.gaussian_sum`).
`PropagatedMoments` is ours (see `synthesis.propagation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from synthesis.gaussian_sum import sum_gaussians
from synthesis.moments import Moments, Probe, Statistics
from synthesis.propagation import propagate
from synthesis.statistics import BATCH_NORMS, execution_order
from synthesis.targets import Target, TargetSource

Adjustment = Literal["none", "min", "mean_minus_min", "mean_plus_min", "mean", "max_minus_mean", "max_plus_mean", "max"]
_PICK: dict[str, Callable[[Tensor], Tensor]] = {
    "min": lambda t: t.min(),
    "mean_minus_min": lambda t: t.mean() - t.min(),
    "mean_plus_min": lambda t: t.mean() + t.min(),
    "mean": lambda t: t.mean(),
    "max_minus_mean": lambda t: t.max() - t.mean(),
    "max_plus_mean": lambda t: t.max() + t.mean(),
    "max": lambda t: t.max(),
}


class PropagatedMoments(TargetSource):
    """Moments of every convolution's output, propagated from the colours of the images through the whole network.

    Args:
        input_mean: of the normalised images, one number or one a channel.
        input_std: the same.

    Raises:
        ValueError: when asked for a network with an operator whose moments are not known.
    """

    site = "conv_output"

    def __init__(self, input_mean: float | Sequence[float] = 0.0, input_std: float | Sequence[float] = 1.0) -> None:
        deviations = torch.as_tensor(input_std, dtype=torch.float32)
        if deviations.min() <= 0:
            raise ValueError(f"targets.input_std: expected positive deviations, got {input_std}")
        self.prior = Moments(torch.as_tensor(input_mean, dtype=torch.float32), deviations.square())

    def input_moments(self) -> Moments:
        return self.prior

    def targets(self, network: nn.Module, input_size: tuple[int, int, int], probe: Probe) -> dict[str, Target]:
        found = propagate(network, input_size, self.prior)
        return {name: _target(found[name]) for name in execution_order(network, input_size, "conv_output")}


class WeightGaussian(TargetSource):
    """mu(n+1) = mu_W(n+1) + b(n+1) + mu(n) and s(n+1)^2 = s_W(n+1)^2 + s(n)^2, from N(0, 1) images (GZSQ).

    n is the layer that feeds layer n + 1 in the graph; behind a concatenation all layers that do, behind an addition
    the trunk (see `synthesis.gaussian_sum`). Where the number of channels stays the same, mu and s are carried on
    channel by channel; where it changes, one number for all channels, chosen from the former ones.

    Args:
        adjustment: that number: a statistic of the former deviations, and of the former means ("mean_plus_min": their
            mean plus their least one, which the paper uses where MobileNetV2 contracts); "none" refuses to choose.

    Raises:
        ValueError: when asked for a network with BatchNorm, or for channels that do not fit with "none".
    """

    site = "conv_output"

    def __init__(self, adjustment: Adjustment = "mean") -> None:
        if adjustment not in get_args(Adjustment):
            raise ValueError(
                f"targets.adjustment: expected one of {', '.join(get_args(Adjustment))}, got {adjustment!r}"
            )
        self.adjustment = adjustment

    @torch.no_grad()
    def targets(self, network: nn.Module, input_size: tuple[int, int, int], probe: Probe) -> dict[str, Target]:
        norm = next((name for name, module in network.named_modules() if isinstance(module, BATCH_NORMS)), None)
        if norm is not None:
            raise ValueError(
                f"network: expected no BatchNorm for statistics of weights, got {norm!r}; fold it into its convolution "
                "with generator.fold_batch_norm=true"
            )
        found = sum_gaussians(network, input_size, self._carried)
        return {name: _target(moments) for name, moments in found.items()}

    def _carried(self, values: Tensor, channels: int, name: str) -> Tensor:
        if self.adjustment == "none":
            raise ValueError(
                f"targets.adjustment: expected a statistic to carry {len(values)} channels on to the {channels} of "
                f"layer {name!r}, got 'none'; choose for example mean_plus_min"
            )
        return _PICK[self.adjustment](values).expand(channels)


def _target(moments: Moments) -> Target:
    none = torch.zeros((), device=moments.mean.device)
    return Target(moments, Statistics(none, none))
