"""A few real images beside the generated ones: centres of the classes for the generator, company for the student.

Zhong, Lin et al., "Fine-grained Data Distribution Alignment for Post-Training Quantization" (FDDA), ECCV 2022, arXiv
2109.04186. Not data-free.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.bn_alignment import BNAlignmentModule
from lightning_modules.generator import GeneratorModule
from reconstruction.schedules import index_batches, seed_of
from synthesis.class_alignment import ClassAlignment, class_centres, expect_classes
from synthesis.look import look_through
from synthesis.moments import Moments, Probe
from synthesis.seeding import seeded
from synthesis.views import Identity, View

PART = 64  # images at a time where centres are measured


class FewShot:
    """Images that the student sees at every step and, where there is an `alignment`, that classes are aligned with.

    Args:
        images: (N, C, H, W), normalised.
        labels: (N,) int64; None where nothing asks for them.
        steps: of the student, for which batches are drawn.
        total_steps: of the generator, warm-up included.
        batch_size: images in each step of the student; 0: none.
        class_batch: images of one class in each step of the generator.
        cross_entropy: weight of the class in that batch.
        untrusted: share of the run, at its beginning, in which classes whose image the teacher misclassifies are made
            too, towards noise.
        alignment: called with centres and the sizes of the layers; None: the generator sees nothing of the images.
        view: what the student sees of them.
        seed: of every draw.

    Raises:
        ValueError: if there are no images, or no labels to align classes with, or a number is out of range; later, if a
            label is no class of the teacher.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        steps: int,
        total_steps: int,
        batch_size: int = 16,
        class_batch: int = 16,
        cross_entropy: float = 0.5,
        untrusted: float = 5 / 400,
        alignment: Callable[..., ClassAlignment] | None = None,
        view: View | None = None,
        seed: int = 0,
    ) -> None:
        if len(images) == 0:
            raise ValueError("images: expected at least one, got none; choose calibration=real")
        if alignment is not None and labels is None:
            raise ValueError(
                "labels: expected the class of every image, to align generated images of the class with it, got none; "
                "choose calibration=real calibration.count=<number of classes>, from all classes"
            )
        if batch_size < 0 or class_batch < 2:
            raise ValueError(f"batch_size, class_batch: expected >= 0 and >= 2, got {batch_size} and {class_batch}")
        if cross_entropy < 0 or not 0.0 <= untrusted <= 1.0:
            raise ValueError(
                f"cross_entropy, untrusted: expected >= 0 and a share of the run from 0 to 1, got {cross_entropy} and "
                f"{untrusted}"
            )
        self.images = images
        self.labels = labels
        self.class_batch = class_batch
        self.cross_entropy = cross_entropy
        self.untrusted_steps = round(untrusted * total_steps)
        self.view = Identity() if view is None else view
        self.seed = seed
        self.batches = None
        if batch_size:
            self.batches = index_batches(len(images), batch_size, steps, seed=seed_of(seed, "few_shot"))
        self._alignment_factory = alignment
        self.alignment: ClassAlignment | None = None
        self.classes = 0

    @torch.no_grad()
    def place(self, device: torch.device, teacher: torch.nn.Module, alignment: BNAlignmentModule | None) -> None:
        """Move the images to `device`, and measure the centres of their classes in the teacher, which is there."""
        self.images = self.images.to(device)
        self.classes = teacher(self.images[:1]).shape[1]
        if self.labels is not None:
            expect_classes(self.labels, self.classes)
        if self._alignment_factory is None or alignment is None:
            return
        assert self.labels is not None
        site = alignment.targets.site
        looks = [
            look_through(teacher, part, alignment.layers, probe=Probe("sample"), site=site)
            for part in self.images.split(PART)
        ]
        sizes = list(alignment.sizes[:-1])  # the last is that of the images themselves
        columns = zip(*(look.moments for look in looks), strict=True)
        samples = Moments(*(torch.cat(column)[:, : sum(sizes)] for column in columns))
        logits = torch.cat([look.logits for look in looks])
        centres = class_centres(samples, self.labels.to(device), logits)
        self.alignment = self._alignment_factory(centres, sizes)

    def batch(self, epoch: int, step: int, done: int) -> tuple[Tensor, Tensor] | None:
        """Images and labels (n, K) for the student's step `done`; without known classes the labels are zeros."""
        if self.batches is None:
            return None
        index = self.batches[done]
        images = self.view(self.images[index.to(self.images.device)], seeded(self.seed, "real", epoch, step), step)
        if self.labels is None:
            return images, images.new_zeros(len(images), self.classes)
        return images, F.one_hot(self.labels[index], self.classes).to(images)

    def terms(self, generator: GeneratorModule, epoch: int, step: int, done: int) -> dict[str, Tensor]:
        """Weighted terms of a batch of one class, made after `done` steps; none without an alignment."""
        if self.alignment is None:
            return {}
        rng = seeded(self.seed, "class", epoch, step)
        label = self.alignment.draw(rng, untrusted=done < self.untrusted_steps)
        labels = F.one_hot(torch.full((self.class_batch,), label), self.classes).to(self.images)
        aligned = generator.alignment
        how = {"probe": Probe("batch"), "site": aligned.targets.site}
        look = look_through(aligned.network, generator.source(rng, labels), aligned.layers, **how)
        terms = self.alignment(look.moments, label, rng)
        if self.cross_entropy:
            terms["class_cross_entropy"] = self.cross_entropy * F.cross_entropy(look.logits.float(), labels)
        return terms
