"""Tunes what is left of a finished student, biases and scales of the whole network, against the teacher's outputs.

Bias tuning: Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets", ICML 2021, arXiv
2006.10518. A network-wide polish of scales, biases and normalisations follows the idea of Wang et al., "NWQ", and of
AE-QDrop. No labels: the teacher's outputs are kept for each image, where the released code looks them up by class.

All that is drawn is a function of the seed, and everything else lives in parameters, buffers and the optimizer, so that
a run resumed from any checkpoint equals an uninterrupted one bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from corrections.gains import absorb_gains, attach_gains
from datamodules.steps import Steps
from quantizers.base import Quantizer
from quantizers.constraints import PowerOfTwo
from quantizers.convert import Conversion
from quantizers.fold import FrozenNorm
from quantizers.layer import WEIGHTED, ActivationSite, quantized_layers, quantizers_of
from reconstruction.schedules import anneal, index_batches, seed_of

Learned = Literal["biases", "activation_scales", "weight_scales", "norms"]
Loss = Literal["kl", "mse"]
OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is tuned, and how.

    Attributes:
        learn: "biases" of all layers; "activation_scales", where the quantizer learns its scale (activation=lsq);
            "weight_scales", a gain for each output channel of layers with a scale for each; "norms", the scale and
            shift of normalisations that no layer could take in.
        optimizer: makes the optimizer from parameter groups.
        loss: "kl": from the teacher's to the student's class probabilities, mean over images and classes as published;
            "mse": of the logits.
        last_layer: whether the bias of the last layer is tuned too.
        scale_lr: learning rate of activation and weight scales, as a share of each scale.
        schedule: "constant", or "cosine" to zero.
        steps: optimizer steps.
        batch_size: images a step.

    Raises:
        ValueError: if a choice is unknown or a number out of range.
    """

    learn: Sequence[Learned]
    optimizer: OptimizerFactory
    loss: Loss = "kl"
    last_layer: bool = False
    scale_lr: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    steps: int = 800
    batch_size: int = 50

    def __post_init__(self) -> None:
        if set(self.learn) - set(get_args(Learned)) or not self.learn:
            raise ValueError(f"learn: expected some of {', '.join(get_args(Learned))}, got {list(self.learn)}")
        if self.loss not in get_args(Loss):
            raise ValueError(f"loss: expected one of {', '.join(get_args(Loss))}, got {self.loss!r}")
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}; corrections=none tunes nothing")
        if not 0.0 <= self.scale_lr < math.inf:
            raise ValueError(f"scale_lr: expected a finite share of at least 0, got {self.scale_lr}")
        anneal(self.schedule, 0, 1)  # refuses an unknown one
        self.optimizer([{"params": [nn.Parameter(torch.zeros(1))]}])  # refuses its own numbers

    def expect(self, conversion: Conversion) -> None:
        """Refuse a student, which may be uncalibrated yet, in which nothing can be tuned so.

        Raises:
            ValueError: saying what it lacks.
        """
        plain, scales = tuned(conversion.student, self.learn, last_layer=self.last_layer)
        own = [layer.weight_quantizer for _, layer in quantized_layers(conversion.student)]
        gained = [q for q in own if q.channel_axis is not None] if "weight_scales" in self.learn else []
        if any(isinstance(quantizer.range, PowerOfTwo) for quantizer in gained):
            raise ValueError(
                "learn: expected no weight_scales with protocol.power_of_two=true, since a gain is no power of two; "
                "leave weight_scales out"
            )
        self.expect_some(plain, scales, gained)

    def expect_some(self, *found: Sized) -> None:
        """Refuse to tune nothing.

        Raises:
            ValueError: naming what was looked for.
        """
        if not any(map(len, found)):
            raise ValueError(f"learn: expected something to tune, got a student without {' or '.join(self.learn)}")


class TuningModule(pl.LightningModule):
    """Optimises parts of the student so that its outputs meet the teacher's; train with `trainer_arguments()`.

    Rounded weights stay as they are. The last step is the result.

    Attributes:
        facts: after training, the loss over all images before and after, and how many numbers were tuned.

    Args:
        conversion: the student is changed in place.
        teacher: the float network.
        images: (N, C, H, W), normalised; moved to the device as a whole.
        seed: of the batches.
        settings: those of `Tuning`.

    Raises:
        ValueError: if there is no image or nothing to tune, or from `Tuning`.
        RuntimeError: at the end of training, when the loss is not finite.
    """

    stage = "tuning"
    entry_loss: Tensor

    def __init__(
        self,
        conversion: Conversion,
        teacher: nn.Module,
        *,
        images: Tensor,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if len(images) == 0:
            raise ValueError("images: expected at least one, got none; choose calibration=synthetic, real or noise")
        tuning = Tuning(**settings)
        tuning.expect(conversion)
        self.student = conversion.student
        self.tuning, self.seed = tuning, seed
        self.batches = index_batches(len(images), tuning.batch_size, tuning.steps, seed=seed_of(seed, "tuning"))
        self.facts: dict[str, Any] = {}
        # neither belongs into checkpoints, nor does a teacher among the modules that training mode reaches
        self._images, self._teacher = images, [teacher]
        self.register_buffer("entry_loss", torch.tensor(torch.nan))
        for _, quantizer in quantizers_of(self.student):
            quantizer.harden()
        self.student.requires_grad_(False)
        self._plain, self._scales = tuned(self.student, tuning.learn, last_layer=tuning.last_layer)
        self._gains = attach_gains(self.student) if "weight_scales" in tuning.learn else {}
        tuning.expect_some(self._plain, self._scales, self._gains)
        gains = [gained.gain for gained in self._gains.values()]
        for parameter in (*self._plain, *gains, *(quantizer.scale for quantizer in self._scales)):
            parameter.requires_grad_(True)
        self.train()  # Lightning warns of modules in evaluation mode; `on_train_start` puts them back

    @property
    def total_steps(self) -> int:
        """Steps of the whole stage."""
        return self.tuning.steps

    def trainer_arguments(self) -> dict[str, Any]:
        """What a Trainer for this module needs."""
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}

    def train_dataloader(self) -> Steps:
        """Count the steps."""
        return Steps(self.tuning.steps)

    def configure_optimizers(self) -> Any:
        """One group for biases and normalisations at the optimizer's own rate, others for gains and other scales."""
        groups: list[dict[str, Any]] = [{"params": self._plain}] if self._plain else []
        if self._gains:
            groups.append({"params": [gained.gain for gained in self._gains.values()], "lr": self.tuning.scale_lr})
        rates = [self.tuning.scale_lr * float(quantizer.step().detach()) for quantizer in self._scales]
        groups += [{"params": [q.scale], "lr": lr} for q, lr in zip(self._scales, rates, strict=True)]
        optimizer = self.tuning.optimizer(groups)
        schedule = LambdaLR(optimizer, partial(anneal, self.tuning.schedule, steps=self.tuning.steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_fit_start(self) -> None:
        """Bring images and batches to the device and ask the teacher about every image, once."""
        self._images, self.batches = self._images.to(self.device), self.batches.to(self.device)
        with torch.no_grad():
            self.targets = self._answers(self._teacher[0].to(self.device).eval())

    def on_train_start(self) -> None:
        """Let everything compute as deployed, and measure the loss to start from."""
        self.student.eval()
        if not bool(self.entry_loss.isfinite()):  # a resumed run has it from its checkpoint
            self.entry_loss.copy_(self._whole_loss())

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """The loss on the images of step `batch_idx`."""
        index = self.batches[batch_idx]
        return self._distance(self.student(self._images[index]), self.targets[index])

    def on_train_end(self) -> None:
        """Report, and leave a student in which nothing is learnable."""
        absorb_gains(self.student, self._gains)
        self.student.requires_grad_(False)
        for quantizer in self._scales:
            quantizer.harden()
        after, before = float(self._whole_loss()), float(self.entry_loss)
        if not after < float("inf"):
            raise RuntimeError(
                f"{self.stage}: expected a finite loss after {self.tuning.steps} steps, got {after} (it began at "
                f"{before}); lower the learning rate of its optimizer"
            )
        gains = [gained.gain for gained in self._gains.values()]
        count = sum(p.numel() for p in (*self._plain, *gains)) + len(self._scales)
        self.facts = {"loss_before": before, "loss_after": after, "steps": self.tuning.steps, "tuned": count}
        for logger in self.trainer.loggers:
            named = {f"{self.stage}/{key}": value for key, value in self.facts.items()}
            logger.log_metrics(named, step=self.trainer.global_step)

    def _answers(self, network: nn.Module) -> Tensor:  # (N, K)
        return torch.cat([network(part).float() for part in self._images.split(self.batches.shape[1])])

    @torch.no_grad()
    def _whole_loss(self) -> Tensor:
        return self._distance(self._answers(self.student), self.targets)

    def _distance(self, logits: Tensor, targets: Tensor) -> Tensor:  # (B, K) each
        if self.tuning.loss == "mse":
            return F.mse_loss(logits.float(), targets)
        divergence = F.kl_div(logits.float().log_softmax(1), targets.log_softmax(1), reduction="none", log_target=True)
        return divergence.mean()


def tuned(
    student: fx.GraphModule, learn: Sequence[Learned], *, last_layer: bool
) -> tuple[list[Tensor], list[Quantizer]]:
    """Biases and normalisations, each once, and the quantizers whose scale is a Parameter."""
    called = [student.get_submodule(str(node.target)) for node in student.graph.nodes if node.op == "call_module"]
    layers = [layer for module in called for layer in module.modules() if isinstance(layer, WEIGHTED)]
    found: dict[Tensor, None] = {}
    if "biases" in learn:
        found |= {m.bias: None for m in layers[: None if last_layer else -1] if m.bias is not None}
    if "norms" in learn:
        norms = [module for module in student.modules() if isinstance(module, FrozenNorm)]
        found |= {parameter: None for norm in norms for parameter in (norm.scale, norm.shift)}
    scales: list[Quantizer] = []
    if "activation_scales" in learn:
        sites = [m for m in student.modules() if isinstance(m, ActivationSite) and m.enabled]
        scales = [site.quantizer for site in sites if isinstance(site.quantizer.scale, nn.Parameter)]
    return list(found), scales
