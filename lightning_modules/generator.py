"""Synthesis of images from a frozen network: one epoch makes one batch of images.

Every draw is a function of (seed, batch of images, step), and everything else lives in parameters, buffers and the
optimizer, so that a run resumed from any checkpoint equals an uninterrupted one bit by bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from datamodules.steps import Steps
from lightning_modules.bn_alignment import BNAlignmentModule
from synthesis.criteria import Criterion, LayerWeights
from synthesis.moments import Probe
from synthesis.priors import Prior
from synthesis.seeding import seeded
from synthesis.sources import SampleSource
from synthesis.statistics import execution_order
from synthesis.targets import BNTargets, TargetSource
from synthesis.views import Identity, View

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]

CHECK_EVERY = 25  # steps between looks at the loss, each of which waits for the device
NO_BATCH = -1


class GeneratorModule(pl.LightningModule):
    """Optimises a sample source until the statistics of its images match; train with `max_epochs=module.batches`.

    The buffer `images`, (count, C, H, W), holds the parameters after the last step; NaN where not yet made.

    Args:
        alignment: the loss.
        source: what is optimised.
        count: images to make, in batches of `source.batch_size`; the last batch is truncated.
        steps: optimizer steps a batch.
        optimizer: makes the optimizer from parameter groups.
        schedule: makes a scheduler, which advances with every step; `ReduceLROnPlateau` watches the training loss.
        view: what the network sees of the images.
        priors: further weighted terms by name.
        seed: of every draw.

    Raises:
        RuntimeError: in training, when the loss is not finite, naming step and layer.
    """

    stage = "synthesis"
    images: Tensor
    entered: Tensor

    def __init__(
        self,
        alignment: BNAlignmentModule,
        source: SampleSource,
        *,
        count: int,
        steps: int,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory | None = None,
        view: View | None = None,
        priors: Mapping[str, Prior] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if count < 1 or steps < 1:
            raise ValueError(f"count, steps: expected at least 1, got {count} and {steps}")
        self.alignment = alignment
        self.source = source
        self.steps = steps
        self.batches = math.ceil(count / source.batch_size)
        self.view = Identity() if view is None else view
        self.priors = dict(priors or {})
        self.seed = seed
        self._optimizer_factory = optimizer
        self._schedule_factory = schedule
        self._fresh_groups: list[dict[str, Any]] = []
        self._fresh_schedule: dict[str, Any] = {}
        self._loss = torch.zeros(())
        self.register_buffer("images", torch.full((count, *alignment.input_size), math.nan))
        self.register_buffer("entered", torch.tensor(NO_BATCH))  # the epoch whose batch is being optimised

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage."""
        return self.batches * self.steps

    @property
    def progress_label(self) -> str:
        """The batch of images in work."""
        return f"images {min(int(self.entered) + 1, self.batches)}/{self.batches}" if int(self.entered) >= 0 else ""

    def train_dataloader(self) -> Steps:
        """Count the steps of one batch of images."""
        return Steps(self.steps)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer_factory(self.source.parameter_groups())
        schedule = None if self._schedule_factory is None else self._schedule_factory(optimizer)
        self._fresh_groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        if schedule is None:
            return optimizer
        self._fresh_schedule = copy.deepcopy(schedule.state_dict())
        # Lightning would look the plateau's loss up among the logged metrics, which are not logged at every step.
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "reduce_on_plateau": False},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(self._loss))
        else:
            scheduler.step()

    def on_fit_start(self) -> None:
        self.alignment.place(self.device)
        if self.trainer.ckpt_path is None:
            self.entered.fill_(NO_BATCH)  # a fit that was interrupted before does not count

    def on_train_batch_start(self, batch: int, batch_idx: int) -> None:
        # Lightning skips on_train_epoch_start after a resume, even when the checkpoint was the last of its epoch.
        # Inside an epoch nothing is to be done: the checkpoint holds all that `enter` sets.
        if batch_idx == 0:
            self.enter(self.current_epoch)

    def enter(self, epoch: int) -> None:
        """Start the batch of images `epoch`: fresh parameters, optimizer and schedule. Idempotent."""
        if (present := int(self.entered)) == epoch:
            return
        if present != NO_BATCH:
            raise RuntimeError(
                f"synthesis: expected batch {present} to be finished before batch {epoch} starts, it was cut short by "
                "max_steps or limit_train_batches, after which Lightning counts the epoch as done. Train with "
                "max_epochs=module.batches, and resume from a checkpoint written inside the epoch"
            )
        if epoch == 0:
            self.alignment.forget()
        self.source.reset(seeded(self.seed, "source", epoch))
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
            for group, fresh in zip(optimizer.param_groups, self._fresh_groups, strict=True):
                group.update(copy.deepcopy(fresh))
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.load_state_dict(copy.deepcopy(self._fresh_schedule))
        self.entered.fill_(epoch)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Return the loss of the present images; `batch` only counts."""
        epoch = self.current_epoch
        images = self.source()
        terms = self.alignment(self.view(images, seeded(self.seed, "view", epoch, batch_idx)))
        for name, prior in self.priors.items():
            terms[name] = prior(images, seeded(self.seed, name, epoch, batch_idx))
        loss = torch.stack(list(terms.values())).sum()
        self._loss = loss.detach()
        if (batch_idx % CHECK_EVERY == 0 or batch_idx == self.steps - 1) and not self._loss.isfinite():
            self._diverged(self.alignment.first_non_finite(images) or "a prior, or the sum of the terms", batch_idx)
        self._log(loss, terms)
        return loss

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Here, not in a later hook: a checkpoint after this step must already hold what follows from it.
        self.source.constrain()
        if batch_idx == self.steps - 1:
            self._finish(epoch)

    @torch.no_grad()
    def _finish(self, epoch: int) -> None:
        """Keep the parameters after the last step."""
        images, start = self.source(), epoch * self.source.batch_size
        if not images.isfinite().all():
            self._diverged("the images", self.steps - 1)
        self.images[start : start + len(images)] = images[: len(self.images) - start]
        self.alignment.remember(images)
        self.entered.fill_(NO_BATCH)

    def _diverged(self, where: str, step: int) -> None:
        raise RuntimeError(
            f"synthesis: expected a finite loss, got {float(self._loss)} in batch {self.current_epoch} at step {step} "
            f"(checked every {CHECK_EVERY} steps); not finite: {where}. Lower the learning rate, or look for extreme "
            "weights or stored statistics before that place"
        )

    def _log(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        # Only when the Trainer hands metrics to its logger: `self.log` costs more than the step of a small network.
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and (self.global_step + 1) % every == 0:
            values = {"synthesis/loss": loss.detach(), "synthesis/lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
            values |= {f"synthesis/{name}": value.detach() for name, value in terms.items()}
            self.log_dict(values, on_step=True, on_epoch=False, batch_size=self.source.batch_size)

    def teardown(self, stage: str) -> None:
        self.alignment.teardown(stage)


def build_generator(
    network: nn.Module,
    input_size: tuple[int, int, int],
    *,
    count: int,
    seed: int,
    steps: int,
    batch_size: int | None,
    source: Callable[..., SampleSource],
    optimizer: OptimizerFactory,
    schedule: ScheduleFactory | None = None,
    probe: Probe | None = None,
    criterion: Criterion | None = None,
    layer_weights: LayerWeights | None = None,
    targets: TargetSource | None = None,
    slack: Callable[..., TargetSource] | None = None,
    input_weight: float = 0.0,
    view: View | None = None,
    priors: Mapping[str, Prior | None] | None = None,
    decorrelation: Callable[..., Prior] | None = None,
) -> GeneratorModule:
    """Compose a generator of `count` images for `network`; `conf/generator/*.yaml` names the parts.

    `batch_size` None stands for L, the number of BatchNorm layers. `source` is called with (batch size, input size),
    `slack` with (targets, batch_size=, seed=), `decorrelation` with the weight 1 / L. None leaves a part out, also
    among `priors`; no targets and layer weights stand for BatchNorm's own and uniform ones.
    """
    layers = len(execution_order(network.eval(), input_size))
    samples = layers if batch_size is None else batch_size
    goal = BNTargets() if targets is None else targets
    if slack is not None:
        goal = slack(goal, batch_size=samples, seed=seed)
    terms = {name: prior for name, prior in (priors or {}).items() if prior is not None}
    if decorrelation is not None:
        terms["decorrelation"] = decorrelation(1 / layers)
    how: dict[str, Any] = {"probe": probe, "criterion": criterion, "layer_weights": layer_weights}
    alignment = BNAlignmentModule(network, input_size, targets=goal, input_weight=input_weight, **how)
    return GeneratorModule(
        alignment,
        source(samples, input_size),
        count=count,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        view=view,
        priors=terms,
        seed=seed,
    )
