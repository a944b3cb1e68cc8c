"""What the papers, or where they are silent the released codes, state of each generator; typed off, never computed.

`None` for a batch is the number of BatchNorm layers. A preset of ours (calibrant, propagated) has the numbers of its
card, noise has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

Curve = Callable[[int], float]  # learning rate after so many steps of a loss that stands still


def plateau(lr: float, patience: int) -> Curve:
    """x0.1 after each `patience` + 1 steps without progress, the first of which follows the step that sets the best."""
    return lambda done: max(lr * 0.1 ** max(0, (done - 1) // (patience + 1)), 1e-4)


def exponential(lr: float) -> Curve:
    """GENIE's generator: x0.95 after every 100 steps."""
    return lambda done: lr * 0.95 ** (done // 100)


def staircase(lr: float) -> Curve:
    """GDFQ: x0.1 at epochs 100, 200 and 300, each of 200 steps."""
    return lambda done: lr * 0.1 ** sum(done >= 200 * epoch for epoch in (100, 200, 300))


def cosine(lr: float, *lengths: int, warmup: int = 100) -> Curve:
    """DeepInversion: 100 steps of warm-up, then half a cosine, at each resolution."""

    def curve(done: int) -> float:
        for length in lengths:
            if done < length:
                if done < warmup:
                    return lr * (done + 1) / warmup
                return lr * (1 + math.cos(math.pi * (done - warmup) / (length - warmup))) / 2
            done -= length
        return 0.0

    return curve


class Published(NamedTuple):
    """One generator.

    Attributes:
        steps: a batch of images, or of the generator that makes all.
        batch: images a step.
        curves: learning rate of each parameter group.
        betas: of Adam.
        start: what pixels start as, or the length of latents.
        crops: whether IntraQ's crops and flips stand before the network.
        shifts: largest roll at 224 pixels in each stage, and how many steps the stage takes.
        low_pass: cut-off of the filter over finished images.
        swing: pixels that strided convolutions are shifted by.
        clamped: whether pixels are held in their valid range.
        mixed: probability of superposed labels, and how many classes they mix.
        fresh: whether labels are drawn anew for each step.
    """

    steps: int
    batch: int | None
    curves: tuple[Curve, ...]
    betas: tuple[float, float] = (0.9, 0.999)
    start: str | int = "normal"
    crops: bool = False
    shifts: tuple[tuple[int, int], ...] = ()
    low_pass: float | None = None
    swing: int | None = None
    clamped: bool = False
    mixed: tuple[float, int] | None = None
    fresh: bool = False


ZEROQ = Published(500, 64, (plateau(0.5, 100),))
INTRAQ = Published(1000, 256, (plateau(0.5, 50),), crops=True)
HAST_CIFAR = INTRAQ._replace(crops=False)
DEEPINVERSION = Published(
    3000, 64, (cosine(0.25, 2000, 1000),), betas=(0.5, 0.9), shifts=((15, 2000), (30, 1000)), clamped=True
)
GENIE = Published(4000, 128, (plateau(0.1, 100), exponential(0.01)), start=256, swing=1)
GDFQ = Published(80_000, 200, (staircase(1e-3),), betas=(0.5, 0.999), start=100, fresh=True)
QIMERA = GDFQ._replace(start=64, mixed=(0.4, 2))

PUBLISHED: dict[str, Published | None] = {
    "zeroq": ZEROQ,
    "dsg": ZEROQ._replace(batch=None),  # the learning rate is not stated
    "dsg_fast": ZEROQ._replace(batch=None, steps=120),
    "dsg_journal": Published(500, None, (plateau(0.9, 260),), start="uniform"),
    "deepinversion": DEEPINVERSION,
    "adaptive_deepinversion": DEEPINVERSION,
    "deepinversion_cifar": Published(
        2000, 256, (cosine(0.1, 2000),), betas=(0.5, 0.9), shifts=((2, 2000),), clamped=True
    ),
    "intraq": INTRAQ,
    "intraq_cifar10": INTRAQ,
    "intraq_cifar100": INTRAQ,
    "hast": INTRAQ,
    "hast_cifar": HAST_CIFAR,
    "synq": INTRAQ._replace(low_pass=70.0),
    "synq_cifar": HAST_CIFAR._replace(low_pass=70.0),
    "genie": GENIE,
    "calibrant": GENIE._replace(steps=1000, crops=True, low_pass=70.0),
    "calibrant_fast": Published(500, 64, (cosine(0.1, 500, warmup=25),), start="coloured", crops=True, clamped=True),
    "gdfq": GDFQ,
    "gdfq_imagenet": GDFQ._replace(batch=16),
    "qimera": QIMERA,
    "qimera_imagenet": QIMERA._replace(batch=16, start=512, mixed=(0.4, 100)),  # of MobileNetV2
    # nothing is stated but the loss: ZeroQ's steps and schedule, our start and rate
    "gzsq": ZEROQ._replace(curves=(plateau(0.002, 100),), start="coloured", clamped=True),
    "propagated": Published(500, 64, (plateau(0.002, 100),), start="coloured", clamped=True),
    "noise": None,
    "uniform_noise": None,
    "coloured_noise": None,
}
