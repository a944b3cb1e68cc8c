"""Terms on what a network says of the images: their class, their place among features, their use to a student.

Each class cites its paper. All are means over the batch, so that no weight depends on its size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthesis.moments import raised


class Answer(NamedTuple):
    """What the networks say of a batch of images.

    Attributes:
        logits: of the teacher, (N, K).
        labels: what the images are made for, probabilities (N, K).
        features: input of the teacher's classifier, (N, F); where a term `uses_features`.
        student: logits of the quantized copy, (N, K); where a term `uses_student`.
    """

    logits: Tensor
    labels: Tensor
    features: Tensor | None = None
    student: Tensor | None = None

    def raised(self) -> Answer:
        """Return the answer with half precision raised to float32."""
        return Answer(*(None if part is None else raised(part) for part in self))  # type: ignore[arg-type]


class Guidance(nn.Module, ABC):
    """A weighted term of the synthesis loss that looks at outputs.

    Args:
        weight: of the term.
    """

    uses_features = False
    uses_student = False
    uses_earlier = False  # whether it compares with the images of earlier batches

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def bind(self, classes: int, width: int) -> None:
        """Make room for what the term keeps between batches: K classes, F features."""

    def forget(self) -> None:
        """Drop what was kept; called before the first batch of images."""

    def remember(self, answer: Answer) -> None:
        """Keep what later batches need of finished images."""

    def forward(self, answer: Answer) -> Tensor:
        """Return the weighted term, a scalar."""
        return self.weight * self.penalty(answer)

    @abstractmethod
    def penalty(self, answer: Answer) -> Tensor:
        """Return the term without its weight."""


class CrossEntropy(Guidance):
    """Cross-entropy of the labels, soft ones included (DeepInversion, GDFQ; Qimera's superposed labels)."""

    def penalty(self, answer: Answer) -> Tensor:
        return F.cross_entropy(answer.logits.float(), answer.labels)


class FocalCrossEntropy(Guidance):
    """mean (1 - p_y)^g CE: samples that are hard for the teacher count more.

    Li et al., "Hard Sample Matters a Lot in Zero-Shot Quantization" (HAST), CVPR 2023, arXiv 2303.13826.

    Args:
        weight: 0.1 for ImageNet, 10 for CIFAR.
        gamma: g; 0.5 for ImageNet, 2 for CIFAR.
    """

    def __init__(self, weight: float, gamma: float) -> None:
        super().__init__(weight)
        self.gamma = gamma

    def penalty(self, answer: Answer) -> Tensor:
        logs = (answer.logits.float().log_softmax(1) * answer.labels).sum(1)
        # p_y of a certain sample rounds to 1, where the gradient of a root would be infinite
        ease = (1 - logs.exp()).clamp_min(1e-6)
        return -(ease.pow(self.gamma) * logs).mean()


class SoftProbability(Guidance):
    """Squared distance of the label's probability from a target below 1: soft inception.

    Zhong et al., "IntraQ", CVPR 2022, arXiv 2111.09136.

    Args:
        weight: of the term.
        target: probability aimed at; 0.95 for CIFAR-10, 0.6 for CIFAR-100, 1 (off) for ImageNet as released.
    """

    def __init__(self, weight: float, target: float) -> None:
        super().__init__(weight)
        if not 0 < target <= 1:
            raise ValueError(f"guidance.target: expected a probability in (0, 1], got {target}")
        self.target = target

    def penalty(self, answer: Answer) -> Tensor:
        probability = (answer.logits.float().softmax(1) * answer.labels).sum(1)
        return (probability - self.target).square().mean()


class CosineMargin(Guidance):
    """[lower - d]_+ + [d - upper]_+ with d = 1 - cos(feature, mean feature of the class over finished batches).

    Zhong et al., "IntraQ", CVPR 2022, arXiv 2111.09136. Classes without a finished image cost nothing. With both bounds
    off it asks for no features and keeps nothing, so that batches of images are independent.

    Args:
        weight: of the term.
        lower: 0.05 for CIFAR-10, 0.02 for CIFAR-100; 0 is off.
        upper: 0.8 for CIFAR-10, 1 for CIFAR-100; 2 is off.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, weight: float, *, lower: float, upper: float) -> None:
        super().__init__(weight)
        if not 0 <= lower <= upper <= 2:
            raise ValueError(f"guidance.lower, upper: expected 0 <= lower <= upper <= 2, got {lower} and {upper}")
        self.lower = lower
        self.upper = upper
        self.uses_features = self.uses_earlier = lower > 0 or upper < 2

    def bind(self, classes: int, width: int) -> None:
        self.register_buffer("sums", torch.zeros(classes, width))
        self.register_buffer("counts", torch.zeros(classes, 1))

    def forget(self) -> None:
        self.sums.zero_()
        self.counts.zero_()

    @torch.no_grad()
    def remember(self, answer: Answer) -> None:
        if not self.uses_earlier:
            return
        assert answer.features is not None
        self.sums += answer.labels.mT @ answer.features
        self.counts += answer.labels.sum(0).unsqueeze(1)

    def penalty(self, answer: Answer) -> Tensor:
        if not self.uses_features:
            return answer.logits.new_zeros(())
        assert answer.features is not None
        known = (answer.labels @ (self.counts > 0).float()).squeeze(1)
        centres = answer.labels @ (self.sums / self.counts.clamp_min(1))
        distance = 1 - F.cosine_similarity(answer.features.float(), centres, dim=1)
        outside = (self.lower - distance).clamp_min(0) + (distance - self.upper).clamp_min(0)
        return (known * outside).mean()


class Competition(Guidance):
    """1 - JS(teacher, student): images on which the two disagree (Adaptive DeepInversion).

    Yin et al., CVPR 2020, arXiv 1912.08795. The divergence is divided by log 2, so that it lies in [0, 1].

    Args:
        weight: 0.2 in the paper for ImageNet, up to 10 for CIFAR.
        temperature: of both softmax functions.
    """

    uses_student = True

    def __init__(self, weight: float, temperature: float = 3.0) -> None:
        super().__init__(weight)
        if temperature <= 0:
            raise ValueError(f"guidance.temperature: expected a positive number, got {temperature}")
        self.temperature = temperature

    def penalty(self, answer: Answer) -> Tensor:
        assert answer.student is not None
        p = (answer.logits.float() / self.temperature).log_softmax(1)
        q = (answer.student.float() / self.temperature).log_softmax(1)
        middle = torch.logaddexp(p, q) - math.log(2)
        divergence = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1) / 2
        return 1 - divergence.mean() / math.log(2)


class Guides(nn.Module):
    """All terms of one synthesis, by name, and the student that some of them look at.

    Args:
        terms: by name.
        student: the quantized copy; not saved, trained or switched with this module.

    Raises:
        ValueError: if a term compares with a student and there is none.
    """

    def __init__(self, terms: Mapping[str, Guidance], student: nn.Module | None = None) -> None:
        super().__init__()
        self.terms = dict(terms)
        self.kept = nn.ModuleList(self.terms.values())  # whose buffers belong to a checkpoint
        self.uses_features = any(term.uses_features for term in self.terms.values())
        self.uses_earlier = any(term.uses_earlier for term in self.terms.values())
        self.uses_student = any(term.uses_student for term in self.terms.values())
        self._student = (student,)
        if student is None and self.uses_student:
            raise ValueError("student: expected a quantized copy for a term that compares with it, got none")

    def bind(self, classes: int, width: int) -> None:
        """See `Guidance.bind`."""
        for term in self.terms.values():
            term.bind(classes, width)

    def forget(self) -> None:
        """See `Guidance.forget`."""
        for term in self.terms.values():
            term.forget()

    def remember(self, answer: Answer) -> None:
        """See `Guidance.remember`."""
        for term in self.terms.values():
            term.remember(answer)

    def ask_student(self, images: Tensor, answer: Answer) -> Answer:
        """Return `answer` with the student's to the same images, if a term needs it."""
        student = self._student[0]
        if student is None or not self.uses_student:
            return answer
        return answer._replace(student=student(images))

    def forward(self, answer: Answer) -> dict[str, Tensor]:
        """Return the weighted terms by name."""
        return {name: term(answer) for name, term in self.terms.items()}
