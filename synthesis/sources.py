"""What is optimised so that images come out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from synthesis.coloured_noise import coloured_noise

Init = Literal["normal", "coloured", "uniform", "valid_uniform", "zeroq_legacy"]
LEGACY_VARIANCE = 5418.75  # 255^2 / 12


class SampleSource(nn.Module, ABC):
    """Parameters from which a batch of images is made. They exist from construction and are reset in place."""

    batch_size: int
    lasting: bool = False  # whether one training serves all images, instead of a fresh start for each batch

    def bind(self, classes: int, classifier: nn.Module) -> None:
        """Learn the number of classes and the network's last layer, once, before anything else is called."""

    @abstractmethod
    def reset(self, rng: torch.Generator) -> None:
        """Start a new batch: redraw all parameters in place from `rng`, a CPU generator."""

    @abstractmethod
    def forward(self, rng: torch.Generator, labels: Tensor) -> Tensor:
        """Return the images (N, C, H, W).

        Args:
            rng: of latents that are drawn at every step, a CPU generator.
            labels: what the images are made for, probabilities (N, K).
        """

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""

    def constrain(self) -> None:
        """Move the parameters back to where they may be; called after every optimizer step."""


class Pixels(SampleSource):
    """The pixels themselves.

    Args:
        batch_size: images that are optimised together.
        input_size: (C, H, W).
        init: "normal" N(0, 1); "coloured" the same with the spectrum and colours of photographs (`coloured_noise`);
            "uniform" U[0, 1); "valid_uniform" between the bounds of `clamp` or `valid`;
            "zeroq_legacy" (randint(255) - 127.5) / 5418.75, what ZeroQ's code draws: it divides by a variance whose
            root was forgotten, so the images are nearly black (std 0.0136).
        clamp: lowest and highest value, each a number or one a channel; None leaves pixels free.
        valid: mean and std of the teacher's normalisation: clamp to what pixels in [0, 1] become; not with `clamp`.
    """

    def __init__(
        self,
        batch_size: int,
        input_size: tuple[int, int, int],
        *,
        init: Init = "normal",
        clamp: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
        valid: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if valid is not None:
            if clamp is not None:
                raise ValueError("clamp, valid: expected at most one of them, got both")
            pairs = list(zip(*valid, strict=True))
            clamp = [-mean / std for mean, std in pairs], [(1 - mean) / std for mean, std in pairs]
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if init not in get_args(Init):
            raise ValueError(f"init: expected one of {', '.join(get_args(Init))}, got {init!r}")
        if init == "valid_uniform" and clamp is None:
            raise ValueError("init: expected bounds for 'valid_uniform', got none; set clamp or valid")
        self.batch_size = batch_size
        self.init = init
        self.pixels = nn.Parameter(torch.zeros(batch_size, *input_size))
        self.clamped = clamp is not None
        low, high = (float("-inf"), float("inf")) if clamp is None else clamp
        self.register_buffer("low", torch.as_tensor(low, dtype=torch.float32).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("high", torch.as_tensor(high, dtype=torch.float32).reshape(1, -1, 1, 1), persistent=False)

    @torch.no_grad()
    def reset(self, rng: torch.Generator) -> None:
        shape = self.pixels.shape
        if self.init == "normal":
            fresh = torch.randn(shape, generator=rng)
        elif self.init == "coloured":
            fresh = coloured_noise(shape, rng)
        elif self.init == "uniform":
            fresh = torch.rand(shape, generator=rng)
        elif self.init == "valid_uniform":
            low, high = self.get_buffer("low"), self.get_buffer("high")
            fresh = torch.rand(shape, generator=rng).to(low) * (high - low) + low
        else:
            fresh = (torch.randint(255, shape, generator=rng) - 127.5) / LEGACY_VARIANCE
        self.pixels.copy_(fresh)
        self.constrain()

    def forward(self, rng: torch.Generator, labels: Tensor) -> Tensor:
        return self.pixels

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.pixels]}]

    @torch.no_grad()
    def constrain(self) -> None:
        if self.clamped:
            self.pixels.copy_(self.pixels.clamp(self.get_buffer("low"), self.get_buffer("high")))
