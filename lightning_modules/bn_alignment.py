"""How well the statistics of images agree with those that a network stored in its BatchNorm layers."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from synthesis.criteria import Criterion, LayerWeights, SquaredL2, Uniform
from synthesis.diversity import Diversity
from synthesis.features import ClassifierInput
from synthesis.look import Look, WatchedNetwork, look_through
from synthesis.moments import Moments, Probe, Statistics, exactly, merge
from synthesis.statistics import LayerStatistics, device_of, execution_order
from synthesis.targets import BNTargets, TargetSource

INPUT = "input"
TARGETS = ("mean", "spread", "mean_slack", "spread_slack")  # buffers that hold them, all layers side by side
SAMPLE = Probe("sample")  # of the diagnosis, whatever the loss looks at


def images_of(batch: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
    """The images of a batch: the batch itself, or its first item."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()))
    return batch if isinstance(batch, Tensor) else batch[0]


class BNAlignmentModule(pl.LightningModule):
    """The alignment loss of images; under `Trainer.validate` it scores any image set, layer by layer.

    The network is frozen and put in eval mode. It is deliberately no submodule: a Trainer shall neither save it,
    train it nor switch its mode.

    Args:
        network: with the layers that the targets are for, BatchNorm as a rule.
        input_size: (C, H, W) of its input.
        targets: which moments to match.
        probe: how moments are taken.
        criterion: how far apart statistics are.
        layer_weights: how much each layer counts.
        input_weight: of the same criterion on the images themselves against what `targets` expects of them, N(0, 1) as
            a rule, without slack; 0 for none.

    Raises:
        ValueError: if the network has no such layers.
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
        self.home = device_of(network)
        self.input_size = input_size
        self.targets = BNTargets() if targets is None else targets
        self.probe = Probe() if probe is None else probe
        self.criterion = SquaredL2() if criterion is None else criterion
        self.layer_weights = Uniform() if layer_weights is None else layer_weights
        self.input_weight = input_weight
        channels = execution_order(network, input_size, self.targets.site)
        self.layers = tuple(channels)
        self.sizes = [*channels.values(), input_size[0]]
        self._register_buffers(sum(self.sizes))
        self._ready = False
        self.diversities: dict[int, Diversity] = {}  # of each validated set

    def _register_buffers(self, total: int) -> None:
        # targets and slacks of all layers side by side, the input image last
        for name in (*TARGETS, "earlier_mean", "earlier_var"):
            self.register_buffer(name, torch.zeros(total))
        self.register_buffer("earlier_count", torch.zeros(()))
        self.register_buffer("prepared", torch.zeros((), dtype=torch.bool))
        segments = torch.block_diag(*(torch.ones(size, 1) for size in self.sizes))
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
            columns: dict[str, list[Tensor]] = {name: [] for name in TARGETS}
            for layer in self.layers:
                target = found[layer]
                goal = self.probe.statistics(target.moments)
                for name, value in zip(columns, (*goal, *target.slack), strict=True):
                    columns[name].append(value.expand_as(goal.mean))
            one = torch.ones(self.sizes[-1], device=device_of(self.network))
            wanted = self.targets.input_moments()
            goal = self.probe.statistics(Moments(*(one * value.to(one.device) for value in wanted)))
            for name, value in zip(columns, (*goal, 0 * one, 0 * one), strict=True):
                self.get_buffer(name).copy_(torch.cat([*columns[name], value]))
            self.get_buffer("prepared").fill_(True)
        self._ready = True

    def found_targets(self) -> Tensor:
        """Return targets and slacks as one tensor (4, sum of C) that `recall` takes back: they are worth keeping."""
        self.prepare()
        return torch.stack([self.get_buffer(name).detach().cpu() for name in TARGETS])

    def recall(self, found: Tensor) -> None:
        """Take targets and slacks that `found_targets` gave."""
        for name, value in zip(TARGETS, found, strict=True):
            self.get_buffer(name).copy_(value)
        self.get_buffer("prepared").fill_(True)
        self._ready = True

    def look(self, images: Tensor, features: ClassifierInput | None = None) -> Look:
        """Return what one forward pass shows; moments are (rows, sum of C), a row a sample, or one for a batch."""
        site = self.targets.site
        found = look_through(self.network, images, self.layers, probe=self.probe, site=site, features=features)
        return self._with_earlier(found, len(images))

    def compiled_look(
        self, backend: str | Callable[..., Any], features: ClassifierInput | None = None
    ) -> Callable[[Tensor], Look]:
        """Return `look` as one function that `torch.compile` makes, at its first call with each shape of images."""
        torch.compiler.reset()  # torch gives up after eight functions of one code, those of earlier fits included
        site, head = self.targets.site, None if features is None else features.classifier
        watched = WatchedNetwork(self.network, self.layers, probe=self.probe, site=site, classifier=head)
        compiled = torch.compile(watched.forward, backend=backend, dynamic=False)
        # view_as, because a parameter and what a view makes of it would be compiled one by one
        return lambda images: self._with_earlier(compiled(images.view_as(images)), len(images))

    def _with_earlier(self, seen: Look, count: int) -> Look:
        if self.probe.reduction != "all":
            return seen
        earlier = Moments(self.get_buffer("earlier_mean"), self.get_buffer("earlier_var"))
        return seen._replace(moments=merge([seen.moments, earlier], [count, self.get_buffer("earlier_count")]))

    def moments(self, images: Tensor) -> Moments:
        """Return the moments that `look` sees."""
        return self.look(images).moments

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # (N, C, H, W)
        """Return the loss terms of `images`; see `terms`."""
        return self.terms(self.moments(images), len(images))

    def terms(self, moments: Moments, samples: int) -> dict[str, Tensor]:
        """Return the loss terms "alignment" and, if weighted, "input": sums over layers, means over samples."""
        if not self._ready:
            self.prepare()
        with exactly(moments.mean):
            losses = self._losses(self.probe.statistics(moments))
            layers = len(self.layers)
            weights = self.layer_weights(samples, layers, self.probe.reduction, losses.device)
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
    def first_non_finite(self, moments: Moments) -> Tensor:
        """Return, on the device, the first channel whose moments are not finite; the number of channels if all are.

        Channels of the images come first, then those of the layers in order of execution; `place_of` names them.
        """
        zeros = (0 * moments.mean + 0 * moments.var).sum(0)  # NaN where anything was not finite, in few operations
        layers, images = zeros.split([len(zeros) - self.sizes[-1], self.sizes[-1]])
        return (torch.cat([images, layers, zeros.new_ones(1)]) == 0).byte().argmin()

    def place_of(self, channel: int) -> str | None:
        """Name the place of a channel that `first_non_finite` gave; None if all moments were finite."""
        sizes = [self.sizes[-1], *self.sizes[:-1]]
        names = ("the images", *(f"layer {layer!r}" for layer in self.layers), None)
        return names[bisect_right(list(accumulate(sizes)), channel)]

    def on_validation_start(self) -> None:
        self.place(self.device)
        self.diversities = {}
        self._classifier = ClassifierInput(self.network, self.input_size)

    def validation_step(
        self, batch: Tensor | Sequence[Tensor] | Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log gaps and losses of the images (the batch, or its first item); several loaders are several sets."""
        images = images_of(batch)
        with LayerStatistics(self.network, SAMPLE, self.targets.site) as single:
            look = self.look(images, self._classifier)
        seen = self.probe.statistics(look.moments)
        gaps = [
            (value - self.get_buffer(goal)).abs().mean(0).split(self.sizes)
            for value, goal in zip(seen, ("mean", "spread"), strict=True)
        ]
        kind = self.probe.moment
        for index, layer in enumerate([*self.layers, INPUT]):
            values = {"mean_gap": gaps[0][index].mean(), f"{kind}_gap": gaps[1][index].mean()}
            self._log({f"alignment/{layer}/{name}": value for name, value in values.items()}, len(images))
        total = torch.stack(list(self.terms(look.moments, len(images)).values())).sum()
        self._log({"alignment/total": total}, len(images))
        parts = [*(single[layer] for layer in self.layers), SAMPLE.measure(images)]
        found = Moments(*(torch.cat(column, -1) for column in zip(*parts, strict=True)))
        if dataloader_idx not in self.diversities:
            self.diversities[dataloader_idx] = Diversity(self._target_moments(), self.sizes)
        self.diversities[dataloader_idx].update(found, look.features)

    def on_validation_epoch_end(self) -> None:
        """Log what only a whole set can tell: spread around the stored statistics, and likeness of samples."""
        several = len(self.diversities) > 1
        for index, diversity in self.diversities.items():
            suffix = f"/dataloader_idx_{index}" if several else ""
            values = {"feature_similarity": diversity.feature_similarity()}
            for layer, row in zip([*self.layers, INPUT], diversity.compute(), strict=True):
                values |= {f"{layer}/{name}": value for name, value in row._asdict().items()}
            named = {f"alignment/{name}{suffix}": value for name, value in values.items()}
            self.log_dict(named, add_dataloader_idx=False)

    def _target_moments(self) -> Moments:
        mean, spread = self.get_buffer("mean"), self.get_buffer("spread")
        return Moments(mean, spread.square() - self.probe.eps if self.probe.moment == "std" else spread)

    def _log(self, values: dict[str, Any], size: int) -> None:
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size)

    def teardown(self, stage: str) -> None:
        self.network.to(self.home)
