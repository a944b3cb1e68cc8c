"""What goes through a network in the first step of a synthesis, kept by hooks of our own, and its moments by torch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.generator import GeneratorModule


class FirstStep(NamedTuple):
    """One step, in float64.

    Attributes:
        loss: what the optimizer was given.
        images: what the source made; `seen`: what the network saw of them.
        labels: what the images were made for.
        logits: of the network; `answer`: of the student, where one was asked.
        features: what entered the classifier.
        norms: what entered each BatchNorm; `convolutions`: what left each convolution; by path, as executed.
        module: all other parts.
        teacher: the network that images are made for, BatchNorm where it was.
    """

    loss: float
    images: Tensor
    seen: Tensor
    labels: Tensor
    logits: Tensor
    answer: Tensor | None
    features: Tensor
    norms: dict[str, Tensor]
    convolutions: dict[str, Tensor]
    module: GeneratorModule
    teacher: nn.Module


class Loss(pl.Callback):
    """Keeps the loss of the last step."""

    value = float("nan")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.value = float(outputs["loss"])


def first_step(module: GeneratorModule, teacher: nn.Module, student: nn.Module) -> FirstStep:
    """Train for one step; the last pass through a layer is the one that counts, earlier ones measured targets."""
    network, kept = module.alignment.network, {}

    def keep(name: str, value: Any) -> None:
        kept.pop(name, None)
        kept[name] = value.detach().double()

    loss = Loss()
    with ExitStack() as stack:

        def on(part: nn.Module, name: str, entering: bool) -> None:
            handle = (
                part.register_forward_pre_hook(lambda _, x: keep(name, x[0]))
                if entering
                else part.register_forward_hook(lambda _, x, y: keep(name, y))
            )
            stack.callback(handle.remove)

        on(network, "seen", True)
        on(network, "logits", False)
        on(module.source, "images", False)
        stack.callback(module.source.register_forward_hook(lambda _, x, y: keep("labels", x[1])).remove)
        for path, part in network.named_modules():
            if isinstance(part, nn.BatchNorm2d):
                on(part, f"norm {path}", True)
            elif isinstance(part, nn.Conv2d):
                on(part, f"conv {path}", False)
            elif isinstance(part, nn.Linear):
                on(part, "features", True)
        on(student, "answer", False)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "callbacks": [loss]}
        pl.Trainer(accelerator="cpu", max_steps=1, **quiet).fit(module)
    layers = [
        {name.removeprefix(kind): value for name, value in kept.items() if name.startswith(kind)}
        for kind in ("norm ", "conv ")
    ]
    rest = {name: kept.get(name) for name in ("images", "seen", "labels", "logits", "answer", "features")}
    own = {"norms": layers[0], "convolutions": layers[1], "module": module, "teacher": teacher}
    return FirstStep(loss.value, **rest, **own)  # type: ignore[arg-type]


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of each channel of a batch, (C,), as BatchNorm finds them in training."""
    mean, unbiased = (torch.zeros(x.shape[1], dtype=x.dtype) for _ in range(2))
    F.batch_norm(x, mean, unbiased, training=True, momentum=1.0)
    count = x.numel() // x.shape[1]
    return mean, unbiased * (count - 1) / count, unbiased


def stored(network: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Mean and variance that a BatchNorm keeps."""
    norm: Any = network.get_submodule(path)
    return norm.running_mean.double(), norm.running_var.double()
