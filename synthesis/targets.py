"""Which moments the images should have, and how far off they may stay.

Slack: Zhang et al., "Diversifying Sample Generation for Accurate Data-Free Quantization" (DSG), CVPR 2021,
arXiv 2103.01049, section 3.2. The paper leaves open whether the slack of a layer is a scalar; both are offered.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from synthesis.moments import Moments, Probe, Statistics, merge
from synthesis.seeding import seeded
from synthesis.statistics import LayerStatistics, Site, batch_norms, device_of, execution_order


class Target(NamedTuple):
    """Target moments (C,) of one layer, and the slack of its mean and spread, () or (C,)."""

    moments: Moments
    slack: Statistics


class TargetSource(ABC):
    """Where target moments come from, and at which layers; `site` says where those are read."""

    site: Site = "bn_input"

    @abstractmethod
    def targets(self, network: nn.Module, input_size: tuple[int, int, int], probe: Probe) -> dict[str, Target]:
        """Return the target of each layer, in order of execution, on the network's device."""

    def input_moments(self) -> Moments:
        """Return the moments that the images themselves should have, () or one a channel (C,): those of N(0, 1)."""
        return Moments(torch.zeros(()), torch.ones(()))


class BNTargets(TargetSource):
    """The running mean and variance that BatchNorm stored while the network was trained."""

    def targets(self, network: nn.Module, input_size: tuple[int, int, int], probe: Probe) -> dict[str, Target]:
        layers = batch_norms(network)
        found: dict[str, Target] = {}
        for name in execution_order(network, input_size):
            mean, var = cast(Tensor, layers[name].running_mean), cast(Tensor, layers[name].running_var)
            none = torch.zeros((), device=mean.device)
            found[name] = Target(Moments(mean.detach().float(), var.detach().float()), Statistics(none, none))
        return found


class Slack(TargetSource):
    """Decorates a source: a gap that Gaussian noise images already reach is not penalised (SDA).

    The slack of a layer is the `percentile` of |seen - stored| over noise images, measured with the probe of the loss.

    Args:
        source: the targets to relax.
        percentile: epsilon of the paper, in (0, 1].
        images: number of N(0, 1) images.
        batch_size: images per forward pass. With reduction "batch" the statistics depend on it: give the batch size
            of the synthesis; the number of images is then rounded up to whole batches.
        per_channel: one slack a channel instead of one a layer.
        seed: of the noise.
    """

    def __init__(
        self,
        source: TargetSource,
        *,
        percentile: float = 0.9,
        images: int = 1024,
        batch_size: int = 64,
        per_channel: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < percentile <= 1:
            raise ValueError(f"percentile: expected a fraction in (0, 1], got {percentile}; write 0.9 for 90 per cent")
        if images < 1 or batch_size < 1:
            raise ValueError(f"images, batch_size: expected at least 1, got {images} and {batch_size}")
        self.source = source
        self.site = source.site
        self.percentile = percentile
        self.images = images
        self.batch_size = batch_size
        self.per_channel = per_channel
        self.seed = seed

    def targets(self, network: nn.Module, input_size: tuple[int, int, int], probe: Probe) -> dict[str, Target]:
        targets = self.source.targets(network, input_size, probe)
        noise = self._measure_noise(network, input_size, probe)
        return {
            name: target._replace(slack=self._slack(noise[name], target, probe)) for name, target in targets.items()
        }

    def input_moments(self) -> Moments:
        return self.source.input_moments()

    def _slack(self, noise: Moments, target: Target, probe: Probe) -> Statistics:
        seen, stored = probe.statistics(noise), probe.statistics(target.moments)
        return Statistics(*(self._quantile((a - b).abs()) for a, b in zip(seen, stored, strict=True)))

    def _quantile(self, gap: Tensor) -> Tensor:  # (rows, C) -> () or (C,)
        # numpy, because torch.quantile refuses more than 16 million values
        value = np.quantile(gap.cpu().numpy(), self.percentile, axis=0 if self.per_channel else None)
        return torch.as_tensor(value, dtype=gap.dtype, device=gap.device)

    @torch.no_grad()
    def _measure_noise(self, network: nn.Module, input_size: tuple[int, int, int], probe: Probe) -> dict[str, Moments]:
        """Return the moments of noise for each layer, (rows, C): a row a sample, a batch, or one row for "all"."""
        rng, device = seeded(self.seed, "slack"), device_of(network)
        batches: list[dict[str, Moments]] = []
        sizes = [self.batch_size] * math.ceil(self.images / self.batch_size)
        if probe.reduction != "batch":
            sizes[-1] = self.images - self.batch_size * (len(sizes) - 1)
        for size in sizes:
            with LayerStatistics(network, probe, self.site) as seen:
                network(torch.randn(size, *input_size, generator=rng).to(device))
            batches.append(seen)
        rows: dict[str, Moments] = {}
        for name in batches[0]:
            parts = [batch[name] for batch in batches]
            if probe.reduction == "all":
                parts = [merge(parts, sizes)]
            rows[name] = Moments(
                *(torch.cat([torch.atleast_2d(t) for t in column]) for column in zip(*parts, strict=True))
            )
        return rows
