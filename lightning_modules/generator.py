"""Synthesis of images from a frozen network: one epoch makes one batch of images.

Every draw is a function of (seed, batch of images, step), and everything else lives in parameters, buffers, the
optimizer and the images finished so far, all of which a checkpoint holds, so that a run resumed from any checkpoint
equals an uninterrupted one bit by bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from datamodules.steps import Steps
from lightning_modules.bn_alignment import BNAlignmentModule
from synthesis.features import ClassifierInput
from synthesis.guidance import Answer, Guidance, Guides
from synthesis.labels import LabelSource, RandomLabels
from synthesis.look import Look
from synthesis.moments import Moments, exactly, raised
from synthesis.priors import Prior
from synthesis.rates import Rates
from synthesis.seeding import seeded
from synthesis.settling import Settling
from synthesis.sources import SampleSource
from synthesis.surgery import Surgery
from synthesis.views import Identity, View

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler | Rates]

CHECK_EVERY = 25  # steps between looks at the loss, each of which waits for the device
NO_BATCH = -1
NO_STEP = -1
SKIP_REST = -1  # what Lightning takes from on_train_batch_start as the end of an epoch


class Draft(NamedTuple):
    """One step of a source: the images as the network saw them, their labels (N, K), its logits (N, K) and moments, the
    weighted terms by name and their sum."""

    seen: Tensor
    labels: Tensor
    logits: Tensor
    moments: Moments
    terms: dict[str, Tensor]
    loss: Tensor


class GeneratorModule(pl.LightningModule):
    """Optimises a sample source until the statistics of its images match; train with `max_epochs=module.batches`.

    `images`, (count, C, H, W), holds what the parameters give after the last step; NaN where not yet made. It stays on
    the CPU and is no buffer, so that what is on the device does not grow with the number of images. A lasting source is
    trained once, in one epoch, and then makes all images.

    Args:
        alignment: the loss.
        source: what is optimised.
        count: images to make, in batches of `source.batch_size`; the last batch is truncated.
        steps: optimizer steps a batch; 0: the images that the source starts with.
        optimizer: makes the optimizer from parameter groups.
        schedule: makes a scheduler, which advances with every step; `ReduceLROnPlateau` watches the training loss.
        view: what the network sees of the images.
        priors: further weighted terms on the images by name.
        guidance: further weighted terms on outputs by name.
        labels: the classes that images are made for.
        student: the quantized copy that terms with `uses_student` look at.
        surgery: temporary change of the network.
        finalize: what finished images pass through.
        first_batch: number of the first batch, for a share of a larger set: batches are drawn as they are in the whole.
        early_stop: end a batch when the loss has not fallen by a hundredth for that many steps, all of them in the last
            stage of the view; None: never.
        compile: backend of `torch.compile`, which makes one function of the pass through the network; None: none.
        seed: of every draw.

    Raises:
        RuntimeError: in training, when the loss is not finite, naming step and layer.
    """

    stage = "synthesis"
    entered: Tensor
    last_loss: Tensor
    first_bad: Tensor

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
        guidance: Mapping[str, Guidance] | None = None,
        labels: LabelSource | None = None,
        student: nn.Module | None = None,
        surgery: Surgery | None = None,
        finalize: View | None = None,
        early_stop: int | None = None,
        compile: str | Callable[..., Any] | None = None,
        first_batch: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if count < 1 or steps < 0:
            raise ValueError(f"count, steps: expected at least 1 image and no negative steps, got {count} and {steps}")
        self.alignment = alignment
        self.source = source
        self.steps = steps
        self.batches = 1 if source.lasting else math.ceil(count / source.batch_size)
        self.view = Identity() if view is None else view
        self.view.plan(steps)
        self.priors = dict(priors or {})
        self.guides = Guides(guidance or {}, student)
        self.labels = RandomLabels() if labels is None else labels
        self.surgery = surgery
        self.finalize = Identity() if finalize is None else finalize
        self.settling = Settling(early_stop)
        self.compile_backend = compile
        self.first_batch = first_batch
        self.seed = seed
        self._optimizer_factory = optimizer
        self._schedule_factory = schedule
        self._fresh_groups: list[dict[str, Any]] = []
        self._fresh_schedule: dict[str, Any] = {}
        self._look: Callable[[Tensor], Look] | None = None  # the compiled one, while there is a fit
        self.images = torch.full((count, *alignment.input_size), math.nan, dtype=torch.float32)
        self.finished = 0  # of `images`, from the front
        self.register_buffer("entered", torch.tensor(NO_BATCH))  # the epoch whose batch is being optimised
        self.register_buffer("last_loss", torch.zeros(()))  # kept, because a resumed run asks whether it has settled
        # of the present batch of images: the first step whose loss was not finite, and the channel where that began
        self.register_buffer("first_bad", torch.tensor([NO_STEP, 0]))
        self._bind()

    def _bind(self) -> None:
        """Tell source and terms the number of classes and the classifier, and refuse what cannot work together."""
        size = self.alignment.input_size
        classifier = ClassifierInput(self.alignment.network, size)
        with torch.no_grad():
            self.classes = self.alignment.network(torch.zeros(1, *size, device=self.alignment.home)).shape[1]
        self.source.bind(self.classes, classifier.classifier)
        self.guides.bind(self.classes, classifier.width)
        self._features = classifier if self.guides.uses_features else None
        if self._features is not None and self.surgery is not None and not self.surgery.keeps_features:
            raise ValueError(
                f"guidance, surgery: expected terms on features or {type(self.surgery).__name__}, got both; it changes "
                "what features mean. Set generator.surgery=null or leave the term out"
            )

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage."""
        return self.batches * self.steps

    @property
    def has_work(self) -> bool:
        """Whether anything is optimised; without it, call `render` instead of a Trainer."""
        return self.steps > 0

    @property
    def independent(self) -> bool:
        """Whether every batch of images is made without the others, so that several jobs may share the work."""
        return not self.source.lasting and self.alignment.probe.reduction != "all" and not self.guides.uses_earlier

    def render(self) -> None:
        """Make the images of a source as it starts: noise."""
        for epoch in range(self.batches):
            self.source.reset(seeded(self.seed, "source", self.first_batch + epoch))
            self._finish(epoch)

    @property
    def progress_label(self) -> str:
        """The batch of images in work."""
        return f"images {min(int(self.entered) + 1, self.batches)}/{self.batches}" if int(self.entered) >= 0 else ""

    def train_dataloader(self) -> Steps:
        """Count the steps of one batch of images."""
        self._counter = Steps(self.steps)
        return self._counter

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer_factory(self.source.parameter_groups())
        schedule = None if self._schedule_factory is None else self._schedule_factory(optimizer)
        if isinstance(schedule, Rates):
            schedule.plan(self.steps)
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
        if isinstance(scheduler, Rates):
            scheduler.step(float(self.last_loss) if scheduler.reads_loss else math.nan)  # to read waits for the device
        elif isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(float(self.last_loss))
        else:
            scheduler.step()

    def place(self, device: torch.device) -> None:
        """Bring the network to `device`, find the targets there, and compile the pass through it if asked."""
        self.alignment.place(device)
        if self.compile_backend is not None:
            self._look = self.alignment.compiled_look(self.compile_backend, self._features)

    def on_fit_start(self) -> None:
        self.place(self.device)
        if self.trainer.ckpt_path is None:
            self.entered.fill_(NO_BATCH)  # a fit that was interrupted before does not count
            self.finished = 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        finished = self.images[: self.finished]
        checkpoint["finished_images"] = finished.clone()  # a view would be saved with all its storage

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finished = len(checkpoint["finished_images"])
        self.images[: self.finished] = checkpoint["finished_images"]

    def on_train_batch_start(self, batch: int, batch_idx: int) -> int | None:
        # Lightning skips on_train_epoch_start after a resume, even when the checkpoint was the last of its epoch.
        # Inside an epoch nothing is to be done: the checkpoint holds all that `enter` sets.
        if batch_idx == 0:
            self.enter(self.current_epoch)
        elif self._shows_progress(batch_idx - 1) and self.settling.settled(batch_idx, float(self.last_loss)):
            self._finish(self.current_epoch)
            self._counter.restart()
            return SKIP_REST
        return None

    def _shows_progress(self, step: int) -> bool:
        """Whether to look at the loss of `step`: now and then, never in a coarse stage, which must not be the end."""
        return step % CHECK_EVERY == 0 and step >= self.view.settled_from

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
            self.guides.forget()
        self.settling.forget()
        self.first_bad.fill_(NO_STEP)
        self.source.reset(seeded(self.seed, "source", self.first_batch + epoch))
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()
            for group, fresh in zip(optimizer.param_groups, self._fresh_groups, strict=True):
                group.update(copy.deepcopy(fresh))
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.load_state_dict(copy.deepcopy(self._fresh_schedule))
        self.entered.fill_(epoch)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Return the loss of the present images; `batch` only counts."""
        draft = self.draft(self.first_batch + self.current_epoch, batch_idx)
        self._note_bad(batch_idx, draft.moments)
        if (batch_idx % CHECK_EVERY == 0 or batch_idx == self.steps - 1) and not self.last_loss.isfinite():
            self._diverged()
        self._log(draft.loss, draft.terms)
        return draft.loss

    def draft(self, epoch: int, step: int) -> Draft:
        """Make the images of a step, and say what the network and the terms find; every draw is of (epoch, step)."""
        labels = self._labels(epoch, step if self.labels.every_step else 0)
        images = self.source(seeded(self.seed, "latent", epoch, step), labels)
        seen = self._seen(images, epoch, step)
        moments, answer = self._ask(seen, labels, epoch, step)
        with exactly(images):  # the networks may compute in half precision, terms never do
            terms = self.alignment.terms(moments, len(images)) | self.guides(answer.raised())
            for name, prior in self.priors.items():
                terms[name] = prior(raised(images), seeded(self.seed, name, epoch, step))
            loss = torch.stack(list(terms.values())).sum()
        self.last_loss = loss.detach()
        return Draft(seen, labels, answer.logits, moments, terms, loss)

    def _labels(self, epoch: int, step: int) -> Tensor:
        drawn = self.labels.draw(self.source.batch_size, self.classes, seeded(self.seed, "labels", epoch, step))
        return drawn.to(self.device)

    def _seen(self, images: Tensor, epoch: int, step: int) -> Tensor:
        return self.view(images, seeded(self.seed, "view", epoch, step), step)

    def _ask(self, seen: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Moments, Answer]:
        """Pass the images through the network once, and once through the student where a term compares."""
        change = nullcontext()
        if self.surgery is not None:
            change = self.surgery(self.alignment.network, seeded(self.seed, "surgery", epoch, step))
        with change:
            look = self.alignment.look(seen, self._features) if self._look is None else self._look(seen)
        return look.moments, self.guides.ask_student(seen, Answer(look.logits, labels, look.features))

    @torch.no_grad()
    def _note_bad(self, step: int, moments: Moments) -> None:
        """Keep where a loss was not finite for the first time, on the device: at the next look it is everywhere."""
        now = torch.stack([torch.full_like(self.first_bad[0], step), self.alignment.first_non_finite(moments)])
        first = (self.first_bad[0] == NO_STEP) & ~self.last_loss.isfinite()
        self.first_bad.copy_(torch.where(first, now, self.first_bad))

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
        """Keep what the parameters give after the last step."""
        start = epoch * self.source.batch_size
        stop = len(self.images) if self.source.lasting else min(start + self.source.batch_size, len(self.images))
        for first in range(start, stop, self.source.batch_size):
            # of a source that lasts, each further batch is made from latents and labels of its own
            place = self.first_batch * self.source.batch_size + first
            labels = self._labels(place // self.source.batch_size, self.steps if self.source.lasting else 0)
            images = self.source(seeded(self.seed, "images", place), labels)
            if not images.isfinite().all():
                self._diverged()
            images = self.finalize(images, seeded(self.seed, "finalize", place))
            room = self.images[first : min(first + len(images), stop)]
            room.copy_(images[: len(room)])
            self.alignment.remember(images)
            if self._features is not None:
                look = self.alignment.look(images, self._features)
                self.guides.remember(Answer(look.logits, labels, look.features))
        self.finished = stop
        self.entered.fill_(NO_BATCH)

    def _diverged(self) -> None:
        step, channel = self.first_bad.tolist()
        if step == NO_STEP:  # every loss was finite, and the last step spoilt the images
            step, where = self.steps - 1, "the images after it"
        else:
            where = self.alignment.place_of(channel) or "a prior, a term on outputs, or the sum of the terms"
        batch = self.first_batch + self.current_epoch
        raise RuntimeError(
            f"synthesis: expected a finite loss, got {float(self.last_loss)} in batch {batch}; it began "
            f"at step {step} (looked at every {CHECK_EVERY} steps); not finite: {where}. Lower the learning rate, or "
            "look for extreme weights or stored statistics before that place"
        )

    def _log(self, loss: Tensor, terms: Mapping[str, Tensor]) -> None:
        # Only when the Trainer hands metrics to its logger: `self.log` costs more than the step of a small network.
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and (self.global_step + 1) % every == 0:
            values = {"synthesis/loss": loss.detach(), "synthesis/lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
            values |= {f"synthesis/{name}": value.detach() for name, value in terms.items()}
            self.log_dict(values, on_step=True, on_epoch=False, batch_size=self.source.batch_size)

    def teardown(self, stage: str) -> None:
        self._look = None
        self.alignment.teardown(stage)
