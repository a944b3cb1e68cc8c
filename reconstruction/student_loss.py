"""What a student learns from in fine-tuning: the teacher's outputs at a temperature, and labels.

Xu et al., GDFQ, ECCV 2020, arXiv 2003.03603; Choi et al., AIT, CVPR 2022, arXiv 2203.17008 (the divergence alone). The
reduction is stated, since published codes differ in it by a factor of the number of classes: GDFQ, Qimera and AIT take
torch's default, the mean over images and classes, IntraQ and FDDA the mean over images.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "batchmean"]


class StudentLoss:
    """cross_entropy CE(S, y) + divergence tau^2 KL(softmax(T / tau) || softmax(S / tau)).

    Args:
        temperature: tau.
        divergence: weight of the KL; 0 leaves it out.
        cross_entropy: weight of CE; 0 leaves it out, and labels are not looked at.
        reduction: of the KL: "batchmean" over images, "mean" over images and classes, K times less.

    Raises:
        ValueError: if a number is out of its range, both weights are zero, or the reduction is unknown.
    """

    def __init__(
        self,
        temperature: float = 20.0,
        *,
        divergence: float = 1.0,
        cross_entropy: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if min(divergence, cross_entropy) < 0 or divergence + cross_entropy == 0:
            raise ValueError(
                "divergence, cross_entropy: expected weights >= 0, one of them positive, got "
                f"{divergence} and {cross_entropy}"
            )
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction: expected one of {', '.join(get_args(Reduction))}, got {reduction!r}")
        self.temperature = temperature
        self.divergence = divergence
        self.cross_entropy = cross_entropy
        self.reduction: Reduction = reduction

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms by name, scalars in float32.

        Args:
            student: logits (N, K).
            teacher: logits (N, K).
            labels: probabilities (N, K).
        """
        terms: dict[str, Tensor] = {}
        if self.divergence:
            p, q = ((logits.float() / self.temperature).log_softmax(1) for logits in (teacher, student))
            divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean()
            if self.reduction == "mean":  # torch's own warns of it
                divergence = divergence / p.shape[1]
            terms["divergence"] = self.divergence * self.temperature**2 * divergence
        if self.cross_entropy:
            terms["cross_entropy"] = self.cross_entropy * F.cross_entropy(student.float(), labels)
        return terms
