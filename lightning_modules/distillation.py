"""Fine-tuning of a student against its teacher, on the images of a generator that is trained in turn with it.

Xu et al., GDFQ, ECCV 2020, arXiv 2003.03603; Choi et al., Qimera, NeurIPS 2021, arXiv 2111.02625; Choi et al., AIT,
CVPR 2022, arXiv 2203.17008; Zhong, Lin et al., FDDA, ECCV 2022, arXiv 2109.04186. BatchNorm is folded into the student,
so it is frozen; ranges are observed once the generator is warm, where the released codes observe its first images.

Every draw is a function of (seed, epoch, step), and everything else lives in parameters, buffers and the optimizers, so
that a run resumed from any checkpoint equals an uninterrupted one bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from datamodules.steps import Steps
from lightning_modules.epoch_losses import GENERATOR, STUDENT, EpochLosses
from lightning_modules.few_shot import FewShot
from lightning_modules.generator import Draft, GeneratorModule
from lightning_modules.turns import Turns
from quantizers.layer import quantizers_of, sites
from quantizers.moving_average import MovingAverage
from reconstruction.learner import Learner
from reconstruction.student_loss import StudentLoss
from synthesis.seeding import seeded
from synthesis.views import Identity, View


class Lesson(NamedTuple):
    """A batch of the student: images (n, C, H, W), the teacher's logits and labels, probabilities, (n, K) each."""

    images: Tensor
    targets: Tensor
    labels: Tensor


class DistillationModule(pl.LightningModule):
    """Trains a generator and a student in turn; train with `trainer_arguments()`. The last step is the result.

    One step is one step of each: the generator's on its own loss, then the student's on the same images. Only the first
    optimizer's steps are counted in `global_step`, which is thus the number of batches.

    Attributes:
        facts: after training, the student's mean loss in its first and last epoch and the epoch in which it was least,
            which is reported and never taken.

    Args:
        student: converted, with calibrated ranges; changed in place.
        teacher: the float network.
        generator: with a source that lasts; None: the student learns from `few_shot` alone.
        turns: who learns when.
        learner: what of the student is learned, and how.
        loss: of the student.
        few_shot: real images beside the generated ones.
        view: what the student sees of generated images.
        seed: of every draw.

    Raises:
        ValueError: if there are no images, or the generator starts afresh for each batch of them.
        RuntimeError: in training, at the end of an epoch whose loss is not finite; after fewer than `total_steps`.
    """

    stage = "distillation"

    def __init__(
        self,
        student: fx.GraphModule,
        teacher: nn.Module,
        *,
        generator: GeneratorModule | None,
        turns: Turns,
        learner: Learner,
        loss: StudentLoss,
        few_shot: FewShot | None = None,
        view: View | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if generator is None and (few_shot is None or few_shot.batches is None or turns.warmup):
            raise ValueError(
                "generator: expected one, or real images for the student (few_shot, with a batch_size) and no warm-up, "
                "got none"
            )
        if generator is not None and not generator.source.lasting:
            raise ValueError(
                f"generator: expected one that makes new images at every step, got {type(generator.source).__name__}; "
                "choose generator@distillation.generator=gdfq, gdfq_imagenet, qimera or qimera_imagenet"
            )
        if generator is not None and generator.settling.patience is not None:
            raise ValueError(
                "distillation.generator.early_stop: expected null, since the student learns to the last step, got "
                f"{generator.settling.patience}"
            )
        if few_shot is not None and few_shot.labels is None and few_shot.batches is not None and loss.cross_entropy:
            raise ValueError(
                "loss.cross_entropy: expected 0 for images without labels, got "
                f"{loss.cross_entropy}; set distillation.loss.cross_entropy=0, or choose calibration=real"
            )
        self.automatic_optimization = False
        self.student, self.generator = student, generator
        self.turns, self.learner, self.loss, self.few_shot, self.seed = turns, learner, loss, few_shot, seed
        self.view = Identity() if view is None else view
        self.facts: dict[str, Any] = {}
        self._teacher = [teacher]  # neither belongs into checkpoints nor into training mode
        self._averages = [s.quantizer for _, s in sites(student) if isinstance(s.quantizer, MovingAverage)]
        self.losses = EpochLosses()
        if generator is not None:
            generator.source.reset(seeded(seed, "source", 0))
        if turns.student_steps:
            learner.bind(student)
        self.train()  # Lightning warns of modules in evaluation mode; `on_train_start` puts the student back

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage."""
        return self.turns.total_steps

    @property
    def progress_label(self) -> str:
        """The epoch in work, and its mean losses up to now: of the generator, G, and of the student, S."""
        steps = self.global_step
        epoch = max(steps - 1, 0) // self.turns.steps  # of the last step: at the end of the last epoch no other begins
        teaches = epoch >= self.turns.warmup
        label = f"epoch {epoch + 1}/{self.turns.epochs}" + ("" if teaches else " warm-up")
        if steps == 0:
            return label
        generator, student = (self.losses.sums / (steps - epoch * self.turns.steps)).tolist()
        parts = [f"G {generator:.3g}"] if self.generator is not None else []
        return " ".join([label, *parts, *([f"S {student:.3g}"] if teaches else [])])

    def trainer_arguments(self) -> dict[str, Any]:
        """What a Trainer for this module needs."""
        return {"max_epochs": self.turns.epochs, "num_sanity_val_steps": 0, "limit_val_batches": 0}

    def train_dataloader(self) -> Steps:
        """Count the steps of one epoch."""
        return Steps(self.turns.steps)

    def configure_optimizers(self) -> Any:
        """The generator's with its schedule, where there is one, and the student's, whose rate the learner sets."""
        student = [{"optimizer": self.learner.optimizer()}] if self.turns.student_steps else []
        if self.generator is None:
            return student
        made = self.generator.configure_optimizers()
        if not isinstance(made, dict):
            return [{"optimizer": made}, *student]
        return [{"optimizer": made["optimizer"], "lr_scheduler": made["lr_scheduler"]["scheduler"]}, *student]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Let the generator step its own kinds of schedule."""
        assert self.generator is not None
        self.generator.lr_scheduler_step(scheduler, metric)

    def on_fit_start(self) -> None:
        """Bring the teacher and the real images to the device, and measure what is to be matched."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision: expected 32-true or bf16-mixed, got 16-mixed, whose scaled losses do not go with "
                "two optimizers"
            )
        self._teacher[0].to(self.device).eval()
        alignment = None
        if self.generator is not None:
            self.generator.place(self.device)
            alignment = self.generator.alignment
        if self.few_shot is not None:
            self.few_shot.place(self.device, self._teacher[0], alignment)

    def on_train_start(self) -> None:
        """Let the student compute as deployed."""
        self.student.eval()

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One step of the generator, and after the warm-up one of the student."""
        epoch = self.current_epoch
        if batch_idx == 0:
            self.losses.open()
        terms: dict[str, Tensor] = {}
        draft = None
        if self.generator is not None:
            draft, terms = self._teach_generator(self.generator, epoch, batch_idx)
        if epoch >= self.turns.warmup:
            terms |= self._teach_student(draft, epoch, batch_idx)
        self._log(terms)
        if batch_idx == self.turns.steps - 1:
            self._close(epoch)

    def _teach_generator(self, generator: GeneratorModule, epoch: int, step: int) -> tuple[Draft, dict[str, Tensor]]:
        optimizer = self._optimizers[0]
        with unlearned(self.student.parameters() if self.compares_students else ()):
            draft = generator.draft(epoch, step)
            terms = dict(draft.terms)
            if self.few_shot is not None:
                terms |= self.few_shot.terms(generator, epoch, step, epoch * self.turns.steps + step)
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            self.manual_backward(loss)
        optimizer.step()
        generator.source.constrain()
        if (schedule := self.lr_schedulers()) is not None:
            self.lr_scheduler_step(schedule, None)
        self.losses.add(GENERATOR, loss)
        return draft, {f"generator/{name}": term for name, term in terms.items()}

    def _teach_student(self, draft: Draft | None, epoch: int, step: int) -> dict[str, Tensor]:
        done = self.turns.student_step(epoch, step)
        wrapped, alone = self._optimizers[-1], self.generator is None
        optimizer = wrapped.optimizer
        for quantizer in self._averages:
            quantizer.observing = self.turns.observes(done)
        lesson = self._lesson(draft, epoch, step, done)
        terms = self.loss(self.student(lesson.images), lesson.targets, lesson.labels)
        for quantizer in self._averages:
            quantizer.observing = False  # a generator that compares students looks at this one too
        loss = torch.stack(list(terms.values())).sum()
        optimizer.zero_grad()
        self.manual_backward(loss)
        # Lightning counts the steps of its own wrapper: those of the first optimizer, once a batch.
        advance = wrapped.step if alone else optimizer.step
        self.learner.step(optimizer, advance, done, self.turns.student_steps)
        self.losses.add(STUDENT, loss)
        return {f"student/{name}": term for name, term in terms.items()}

    @torch.no_grad()
    def generated(self, count: int) -> Tensor:
        """(count, C, H, W): images of mixed classes, made in batches of the size that the generator learned with."""
        made = self.generator
        assert made is not None
        size, batches = made.source.batch_size, []
        for first in range(0, count, size):
            labels = made.labels.draw(size, made.classes, seeded(self.seed, "image_labels", first)).to(self.device)
            images = made.source(seeded(self.seed, "images", first), labels)
            batches.append(made.finalize(images, seeded(self.seed, "finalize", first)))
        return torch.cat(batches)[:count]

    @torch.no_grad()
    def _lesson(self, draft: Draft | None, epoch: int, step: int, done: int) -> Lesson:
        """The generator's images, as it was before its step, and the real ones; the teacher sees each once at most."""
        images, known, labels = [], [], []
        if draft is not None:
            seen = draft.seen.detach()
            if isinstance(self.view, Identity) and self.generator is not None and self.generator.surgery is None:
                known.append(draft.logits.detach())
            else:
                seen = self.view(seen, seeded(self.seed, "student_view", epoch, step), step)
            images.append(seen)
            labels.append(draft.labels)
        real = None if self.few_shot is None else self.few_shot.batch(epoch, step, done)
        if real is not None:
            images.append(real[0])
            labels.append(real[1])
        unknown = images[len(known) :]
        targets = [*known, self._teacher[0](joined(unknown))] if unknown else known
        return Lesson(joined(images), joined(targets), joined(labels))

    def _close(self, epoch: int) -> None:
        """Report an epoch."""
        values = self.losses.close(epoch, self.turns)
        if self.generator is None:
            values.pop("generator/epoch_loss")
        self._write(values)

    def on_train_end(self) -> None:
        """Report, and leave a student that computes as deployed and in which nothing is learnable."""
        self.expect_complete(self.trainer.global_step)
        if not self.turns.student_steps:
            return
        for _, quantizer in quantizers_of(self.student):
            quantizer.harden()
        learned = sum(parameter.numel() for parameter in self.learner.parameters())
        self.student.requires_grad_(False)
        self.facts = {
            "student_steps": self.turns.student_steps,
            "learned": learned,
            **self.losses.facts(self.turns.steps),
        }

    def expect_complete(self, done: int) -> None:
        """Refuse a training that was cut short.

        Raises:
            RuntimeError: unless all steps were `done`.
        """
        if done != self.total_steps:
            raise RuntimeError(
                f"{self.stage}: expected {self.total_steps} steps, got {done}; take away what cuts the training short "
                "(trainer.max_steps, max_time, limit_train_batches), or set distillation.epochs and distillation.steps"
            )

    def teardown(self, stage: str) -> None:
        if self.generator is not None:
            self.generator.teardown(stage)

    @property
    def compares_students(self) -> bool:
        """Whether the generator's loss looks at the student."""
        return self.generator is not None and self.generator.guides.uses_student

    @property
    def has_panel(self) -> bool:
        """Whether there is a generator to draw classes with."""
        return self.generator is not None

    @torch.no_grad()
    def panel(self, columns: int = 8, rows: int = 10) -> Tensor:
        """(rows * columns, C, H, W): what the generator makes of the first classes now; latents are fixed."""
        assert self.generator is not None
        classes = self.generator.classes
        shown = torch.arange(min(rows, classes)).repeat_interleave(columns)
        labels = F.one_hot(shown, classes).float().to(self.device)
        return self.generator.source(seeded(self.seed, "panel"), labels)

    @property
    def _optimizers(self) -> list[Any]:
        found: Any = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _log(self, terms: dict[str, Tensor]) -> None:
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and self.global_step % every == 0:
            self._write(terms)

    def _write(self, values: dict[str, Tensor]) -> None:
        if not self.trainer.loggers:
            return  # to read the numbers waits for the device
        named = {f"{self.stage}/{name}": float(value.detach()) for name, value in values.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(named, step=self.trainer.global_step)


@contextmanager
def unlearned(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, no gradients of these are computed."""
    kept = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The batches as one; of a single one no copy is made."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
