"""The float network's answers on the evaluation data: measured once and kept in the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from datamodules.evaluation import EvaluationData
from synthesis.store import SampleStore

VERSION = 1  # raise it when the same settings give other answers than before
LARGEST = 256 * 2**20  # bytes of answers that are kept: 50,000 images of 1,000 classes and more
NOT_ASKED = (
    "checkpoint",
    "pretrained",
    "obtain",
    "stated_top1",
    "name",
    "dataset",
    "root",
    "batch_size",
    "num_workers",
)


class FloatReference:
    """What an earlier run, or this one, knows of the float network's answers on the evaluation data.

    Args:
        store: where they are kept.
        data: the evaluation data.
        teacher: fingerprint of the weights.
        settings: of model and data: preprocessing, architecture, limit.
        computed: on what and how (machine, precision, batch size), on which the last bit depends.
    """

    def __init__(
        self,
        store: SampleStore,
        data: EvaluationData,
        *,
        teacher: str,
        settings: Mapping[str, Mapping[str, Any]],
        computed: Mapping[str, Any],
    ) -> None:
        self.store, self.data = store, data
        asked = {group: {k: v for k, v in part.items() if k not in NOT_ASKED} for group, part in settings.items()}
        self.recipe: dict[str, Any] = {"float_reference": VERSION, "teacher": teacher} | asked
        self.computed = dict(computed) | {"torch": torch.__version__}
        self.measured: Tensor | None = None

    def known_top1(self) -> float | None:
        """Top-1 in per cent as an earlier run measured it, or None; opens no image."""
        found = self.store.get(self.recipe | {"of": "top1"})
        return None if found is None else float(found)

    def answers(self) -> Tensor | None:
        """Logits (N, K) of the loaded data in their order, of this run or an earlier one; None if nobody measured."""
        if self.measured is not None:
            return self.measured
        return self.store.get(self._named())

    def keep(self, answers: Tensor, top1: float) -> None:
        """Remember logits (N, K) and top-1 (per cent); answers that are not finite or very large only in this run."""
        self.measured = answers.detach().cpu()
        self.store.keep(self.recipe | {"of": "top1"}, torch.tensor([top1], dtype=torch.float64))
        if answers.numel() * answers.element_size() <= LARGEST and answers.isfinite().all():
            self.store.keep(self._named(), self.measured)

    def _named(self) -> dict[str, Any]:
        return self.recipe | {"of": "answers", "images": self.data.digest, "computed": self.computed}
