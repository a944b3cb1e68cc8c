"""Teachers: pretrained float networks with all that is needed to feed and to check them.

A teacher comes from torchvision, timm, a CIFAR ResNet checkpoint, the weights inside this package, or, for tests,
from a seed. Whatever the source, it is frozen, in eval mode, in float32, with its BatchNorm layers intact unless
asked otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from networks.architectures import SOURCES, Source, build, published_weights
from networks.checkpoints import load_weights, read_checkpoint
from networks.fingerprint import fingerprint
from networks.folding import fold_batch_norm as fold
from networks.published import disagreements, published_preprocessing
from networks.random_weights import settle

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A float network, and how its images are prepared.

    Attributes:
        network: eval mode, no gradients, float32, BatchNorm intact or (`fold_batch_norm`) gone.
        name: for records and tables.
        input_size: (C, H, W).
        num_classes: size of the output.
        mean: of the normalisation, one a channel, for pixels in [0, 1].
        std: the same.
        stated_top1: accuracy its publisher states, per cent; None where nobody does.
        weights_hash: fingerprint of the state dict.
        resize: short side before the centre crop, in pixels; None: images already have their size.
        interpolation: of that resize.
        dataset: what it was trained on, the default source of real calibration images.
    """

    network: nn.Module
    name: str
    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stated_top1: float | None
    weights_hash: str
    resize: int | None
    interpolation: str = "bilinear"
    dataset: str = ""

    def example(self, batch: int = 1) -> Tensor:
        """Zeros of the right shape, (batch, C, H, W), on the network's device and in its precision."""
        tensors = chain(self.network.parameters(), self.network.buffers())
        first = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
        return torch.zeros(batch, *self.input_size, device=first.device, dtype=first.dtype)


def load_teacher(
    architecture: str,
    source: Source,
    *,
    num_classes: int,
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    resize: int | None = None,
    interpolation: str = "bilinear",
    stated_top1: float | None = None,
    name: str | None = None,
    dataset: str = "",
    checkpoint: str | None = None,
    obtain: str = "",
    pretrained: bool = True,
    weights: str = "DEFAULT",
    options: Mapping[str, Any] | None = None,
    fold_batch_norm: bool = False,
    seed: int = 0,
) -> Teacher:
    """Build a network, load its weights, freeze it, and check that it takes what it says it takes.

    Logs a warning where images would be prepared otherwise than the publisher of the weights does.

    Args:
        architecture: name within the source, e.g. "resnet18"; "resnet50_v1" is torchvision's with the early stride.
        source: "torchvision", "timm", "cifar" (`CifarResNet` from a checkpoint), "embedded" (weights in this
            package) or "random" (`CifarResNet` with seeded weights and BatchNorm statistics that fit them).
        num_classes, input_size, mean, std, resize, interpolation, stated_top1, name, dataset: as in `Teacher`.
        checkpoint: a weight file; goes before published weights.
        obtain: where that file can be got, for the message when it is missing.
        pretrained: False: seeded random weights, whatever else is said; for tests.
        weights: which published weights; torchvision's names, or the name of the embedded file.
        options: further arguments of the network's constructor.
        fold_batch_norm: multiply every BatchNorm into its convolution after loading, as deployed networks come: what
            was stored about activations is then gone, and only methods that need no BatchNorm are left.
        seed: of random weights.

    Raises:
        ValueError: naming the argument, what was expected and the remedy, for anything that cannot work.
    """
    size = _input_size(input_size, mean, std)
    if source not in SOURCES:
        raise ValueError(f"model.source: expected one of {', '.join(SOURCES)}, got {source!r}")
    untrained = not pretrained or (source == "random" and checkpoint is None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(source, architecture, num_classes, size[0], options or {})
        if untrained:
            settle(network, size, seed)
    if untrained:
        log.warning("%s has random weights: good for tests only", name or architecture)
    elif checkpoint is not None:
        load_weights(network, read_checkpoint(checkpoint, obtain), str(checkpoint))
    else:
        origin = f"the published weights of {architecture}"
        load_weights(network, published_weights(source, architecture, weights, obtain), origin)
    network.eval().requires_grad_(False)
    if fold_batch_norm:
        network = fold(network).requires_grad_(False)
    _probe(network, size, num_classes)
    teacher = Teacher(
        network=network,
        name=name or architecture,
        input_size=size,
        num_classes=num_classes,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        stated_top1=stated_top1,
        weights_hash=fingerprint(network.state_dict()),
        resize=resize,
        interpolation=interpolation,
        dataset=dataset,
    )
    if not untrained and (published := published_preprocessing(source, architecture, weights)):
        _compare(teacher, published, own_weights=checkpoint is not None)
    return teacher


def _input_size(input_size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> tuple[int, int, int]:
    if len(input_size) != 3 or min(input_size) < 1:
        raise ValueError(f"model.input_size: expected [channels, height, width], got {list(input_size)}")
    channels, height, width = input_size
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(f"model.{key}: expected {channels} values, one a channel, got {list(values)}")
    if min(std) <= 0:
        raise ValueError(f"model.std: expected positive values, got {list(std)}")
    return channels, height, width


def _compare(teacher: Teacher, published: Mapping[str, Any], *, own_weights: bool) -> None:
    """Warn where images are prepared otherwise than for the published weights; other weights may need it so."""
    if text := disagreements(published, vars(teacher)):
        level, unless = (logging.INFO, " (unless the checkpoint needs it so)") if own_weights else (logging.WARNING, "")
        log.log(level, "%s: images are prepared otherwise than published: %s%s", teacher.name, text, unless)


@torch.inference_mode()
def _probe(network: nn.Module, input_size: tuple[int, int, int], num_classes: int) -> None:
    """One image through the network, so that a wrong size is an error here and not deep inside a later stage."""
    try:
        output = network(torch.zeros(1, *input_size))
    except RuntimeError as error:
        raise ValueError(f"model.input_size: the network cannot take {list(input_size)} ({error})") from error
    if not isinstance(output, Tensor) or output.shape != (1, num_classes):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model.num_classes: expected an output of shape (1, {num_classes}), got {got}")
