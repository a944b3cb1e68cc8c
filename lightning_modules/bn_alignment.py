"""How well the statistics of images agree with those that a network stored in its BatchNorm layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from synthesis.criteria import Criterion, LayerWeights, SquaredL2, Uniform
from synthesis.moments import Moments, Probe, Statistics, merge
from synthesis.statistics import BNStatistics, device_of, execution_order
from synthesis.targets import BNTargets, TargetSource

INPUT = "input"


class BNAlignmentModule(pl.LightningModule):
    """The alignment loss of images; under `Trainer.validate` it scores any image set, layer by layer.

    The network is frozen and put in eval mode. It is deliberately no submodule: a Trainer shall neither save it,
    train it nor switch its mode.

    Args:
        network: with BatchNorm layers; outputs are ignored.
        input_size: (C, H, W) of its input.
        targets: which moments to match.
        probe: how moments are taken.
        criterion: how far apart statistics are.
        layer_weights: how much each layer counts.
        input_weight: of the same criterion on the images themselves against N(0, 1), without slack; 0 for none.

    Raises:
        ValueError: if the network has no BatchNorm layers.
    """

    def __init__(
        self,
        network: nn.Module,
        input_size: tuple[int, int, int],
        *,
        targets: TargetSource | None = None,
        probe: Probe | None = None,
        criterion: Criterion | None = None,
        layer_weights: LayerWeights | None = None,
        input_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self._network = (network.eval().requires_grad_(False),)
        self._home = device_of(network)
        self.input_size = input_size
        self.targets = BNTargets() if targets is None else targets
        self.probe = Probe() if probe is None else probe
        self.criterion = SquaredL2() if criterion is None else criterion
        self.layer_weights = Uniform() if layer_weights is None else layer_weights
        self.input_weight = input_weight
        channels = execution_order(network, input_size)
        self.layers = tuple(channels)
        self._sizes = [*channels.values(), input_size[0]]
        self._register_buffers(sum(self._sizes))
        self._ready = False

    def _register_buffers(self, total: int) -> None:
        # targets and slacks of all layers side by side, the input image last
        for name in ("mean", "spread", "mean_slack", "spread_slack", "earlier_mean", "earlier_var"):
            self.register_buffer(name, torch.zeros(total))
        self.register_buffer("earlier_count", torch.zeros(()))
        self.register_buffer("prepared", torch.zeros((), dtype=torch.bool))
        segments = torch.block_diag(*(torch.ones(size, 1) for size in self._sizes))
        self.register_buffer("segments", segments, persistent=False)

    @property
    def network(self) -> nn.Module:
        """The network whose statistics are matched."""
        return self._network[0]

    def place(self, device: torch.device) -> None:
        """Move the network, which no Trainer knows of, to `device` and find the targets there."""
        self.network.to(device)
        self.prepare()

    @torch.no_grad()
    def prepare(self) -> None:
        """Find the targets and slacks, once; a checkpoint carries them."""
        if not self.get_buffer("prepared"):
            found = self.targets.targets(self.network, self.input_size, self.probe)
            columns: dict[str, list[Tensor]] = {"mean": [], "spread": [], "mean_slack": [], "spread_slack": []}
            for layer in self.layers:
                target = found[layer]
                goal = self.probe.statistics(target.moments)
                for name, value in zip(columns, (*goal, *target.slack), strict=True):
                    columns[name].append(value.expand_as(goal.mean))
            one = torch.ones(self._sizes[-1], device=device_of(self.network))
            goal = self.probe.statistics(Moments(0 * one, one))
            for name, value in zip(columns, (*goal, 0 * one, 0 * one), strict=True):
                self.get_buffer(name).copy_(torch.cat([*columns[name], value]))
            self.get_buffer("prepared").fill_(True)
        self._ready = True

    def moments(self, images: Tensor) -> Moments:
        """Return the moments of all layers and of the images, (rows, sum of C); a row a sample, or one for a batch."""
        with BNStatistics(self.network, self.probe) as seen:
            self.network(images)
        parts = [*(seen[layer] for layer in self.layers), self.probe.measure(images)]
        found = Moments(*(torch.atleast_2d(torch.cat(column, -1)) for column in zip(*parts, strict=True)))
        if self.probe.reduction != "all":
            return found
        earlier = Moments(self.get_buffer("earlier_mean"), self.get_buffer("earlier_var"))
        return merge([found, earlier], [len(images), self.get_buffer("earlier_count")])

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # (N, C, H, W)
        """Return the loss terms "alignment" and, if weighted, "input": sums over layers, means over samples."""
        if not self._ready:
            self.prepare()
        losses = self._losses(self.probe.statistics(self.moments(images)))
        layers = len(self.layers)
        weights = self.layer_weights(len(images), layers, self.probe.reduction, losses.device)
        terms = {"alignment": (weights * losses[:, :layers]).sum(1).mean()}
        if self.input_weight:
            terms["input"] = self.input_weight * losses[:, layers].mean()
        return terms

    def _losses(self, seen: Statistics) -> Tensor:  # (rows, L + 1)
        return self.criterion(
            seen,
            Statistics(self.get_buffer("mean"), self.get_buffer("spread")),
            Statistics(self.get_buffer("mean_slack"), self.get_buffer("spread_slack")),
            self.get_buffer("segments"),
        )

    @torch.no_grad()
    def remember(self, images: Tensor) -> None:
        """Add finished images to the statistics that reduction "all" merges with; nothing for other reductions."""
        if self.probe.reduction == "all":
            merged = self.moments(images)
            self.get_buffer("earlier_mean").copy_(merged.mean[0])
            self.get_buffer("earlier_var").copy_(merged.var[0])
            self.get_buffer("earlier_count").add_(len(images))

    def forget(self) -> None:
        """Drop the statistics of finished images."""
        for name in ("earlier_mean", "earlier_var", "earlier_count"):
            self.get_buffer(name).zero_()

    @torch.no_grad()
    def first_non_finite(self, images: Tensor) -> str | None:
        """Return the first place, the images or a layer in order of execution, whose values are not finite."""
        if not images.isfinite().all():
            return "the images"
        parts = self.moments(images)
        finite = (parts.mean.isfinite() & parts.var.isfinite()).all(0).split(self._sizes)
        return next(
            (f"layer {name!r}" for name, good in zip(self.layers, finite, strict=False) if not good.all()), None
        )

    def on_validation_start(self) -> None:
        self.place(self.device)

    def validation_step(self, batch: Tensor | Sequence[Tensor] | Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the mean absolute gap of each layer, and the total loss, of the images (the batch, or its first item)."""
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()))
        images = batch if isinstance(batch, Tensor) else batch[0]
        seen = self.probe.statistics(self.moments(images))
        gaps = [
            (value - self.get_buffer(goal)).abs().mean(0).split(self._sizes)
            for value, goal in zip(seen, ("mean", "spread"), strict=True)
        ]
        kind = self.probe.moment
        for index, layer in enumerate([*self.layers, INPUT]):
            values = {"mean_gap": gaps[0][index].mean(), f"{kind}_gap": gaps[1][index].mean()}
            self._log({f"alignment/{layer}/{name}": value for name, value in values.items()}, len(images))
        self._log({"alignment/total": torch.stack(list(self(images).values())).sum()}, len(images))

    def _log(self, values: dict[str, Any], size: int) -> None:
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size)

    def teardown(self, stage: str) -> None:
        self.network.to(self._home)
