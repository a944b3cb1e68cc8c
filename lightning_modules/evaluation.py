"""EvaluationModule: scores any number of networks against the labels and against a reference in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

TOP_K = 5


class EvaluationModule(LightningModule):
    """Logs `test/<name>/top1`, `top5`, `loss`, and against the reference `agreement` and `kl`.

    Top-1, top-5 and agreement (the share of images on which network and reference predict alike) are in per cent,
    the cross-entropy loss and KL(reference || network) in nats. Top-5 is left out below five classes, the
    last two for the reference itself.

    Args:
        networks: what to score, by name; one that stands under several names runs once.
        reference: name of the float network among them.
        known: (N, K), what the reference answers on all images in their order, if that has been measured before; it is
            not run then.

    Attributes:
        answered: (N, K), what the reference answered in the last pass.

    Raises:
        ValueError: if the reference is not among the networks, or a name cannot be a metric's name.
    """

    stage = "evaluation"

    def __init__(self, networks: Mapping[str, nn.Module], reference: str, *, known: Tensor | None = None) -> None:
        super().__init__()
        if reference not in networks:
            raise ValueError(f"reference: expected one of {', '.join(networks) or '(no networks)'}, got {reference!r}")
        for name in networks:
            if not name.isidentifier():
                raise ValueError(f"networks: expected letters, digits and underscores as a name, got {name!r}")
        self.names = list(networks)
        self.networks = nn.ModuleList(networks.values())  # a ModuleDict would refuse the name "float"
        self.reference = reference
        self.known = known
        self._answered: list[Tensor] = []
        metrics = ("top1", f"top{TOP_K}", "loss", "agreement", "kl")
        self.metrics = nn.ModuleDict({f"{name}/{metric}": MeanMetric() for name in networks for metric in metrics})

    def on_test_epoch_start(self) -> None:
        """Forget an earlier pass."""
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]
        self._answered = []

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Score one batch: images (B, C, H, W) and labels (B,)."""
        images, labels = batch
        answers: dict[nn.Module, Tensor] = {}
        float_network = self.networks[self.names.index(self.reference)]
        if self.known is not None:
            first = sum(len(part) for part in self._answered)
            answers[float_network] = self.known[first : first + len(images)].to(images.device)
        for network in self.networks:  # each once, whatever its names
            if network not in answers:
                answers[network] = network(images).float()
        reference = answers[float_network]
        self._answered.append(reference.cpu())
        for name, network in zip(self.names, self.networks, strict=True):
            self._update(name, answers[network], labels)
            if name != self.reference:
                self._compare(name, answers[network], reference)

    def on_test_epoch_end(self) -> None:
        """Log what was measured."""
        for key, metric in self.metrics.items():
            if metric.update_called:
                self.log(f"test/{key}", metric.compute())  # type: ignore[operator]

    @property
    def answered(self) -> Tensor:
        """The reference's logits (N, K) of the last pass, on the CPU."""
        return torch.cat(self._answered)

    def _update(self, name: str, logits: Tensor, labels: Tensor) -> None:  # (B, K), (B,)
        self._add(name, "loss", F.cross_entropy(logits, labels, reduction="none"))
        self._add(name, "top1", 100.0 * (logits.argmax(1) == labels))
        if logits.shape[1] >= TOP_K:
            best = logits.topk(TOP_K, dim=1).indices  # (B, 5)
            self._add(name, f"top{TOP_K}", 100.0 * (best == labels[:, None]).any(1))

    def _compare(self, name: str, logits: Tensor, reference: Tensor) -> None:  # (B, K) each
        self._add(name, "agreement", 100.0 * (logits.argmax(1) == reference.argmax(1)))
        divergence = F.kl_div(logits.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True)
        self._add(name, "kl", divergence.sum(1))

    def _add(self, name: str, metric: str, values: Tensor) -> None:  # (B,)
        target: Any = self.metrics[f"{name}/{metric}"]
        target.update(values)
