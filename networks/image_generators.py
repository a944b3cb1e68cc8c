"""Networks that turn latent vectors into images: conditional (GDFQ), superposed (Qimera), and plain (GENIE).

Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020, arXiv 2003.03603; Choi et al., "Qimera", NeurIPS
2021, arXiv 2111.02625; Jeon, Lee, Kim, "GENIE", CVPR 2023, arXiv 2212.04780. Deviates: BatchNorm layers keep no running
statistics, because the images that are kept must be those that were optimised, with the statistics of their own batch.
Sizes that 4 does not divide are made a little larger and cropped.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conditioning = Literal["embedding", "batch_norm"]
WIDTH = 128  # channels at a quarter of the size
SLOPE = 0.2  # of the leaky ReLU


class ConditionalNorm(nn.Module):
    """Batch normalisation whose scale and shift are the label's: labels (N, K) @ one row a class."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)
        self.scale = nn.Parameter(torch.ones(classes, channels))
        self.shift = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # (N, C, H, W), (N, K)
        scale, shift = labels @ self.scale, labels @ self.shift
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class PlainNorm(nn.BatchNorm2d):
    """Batch normalisation that does not look at labels."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, track_running_stats=False)

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:  # (N, C, H, W)
        return super().forward(input)


class Trunk(nn.Module):
    """Linear to a quarter of the size, then twice: up by 2 and a convolution; tanh and a normalisation end it.

    Args:
        input_size: (C, H, W) of the images.
        latent: length of what enters.
        classes: K, for normalisations that depend on the label; None for plain ones.
        middle: whether a third convolution keeps the width between the upsamplings, as GDFQ has it.
    """

    def __init__(
        self, input_size: tuple[int, int, int], latent: int, *, classes: int | None = None, middle: bool = True
    ) -> None:
        super().__init__()
        channels, self.height, self.width = input_size
        self.rows, self.columns = math.ceil(self.height / 4), math.ceil(self.width / 4)
        self.linear = nn.Linear(latent, WIDTH * self.rows * self.columns)
        self.norm0 = _norm(WIDTH, classes)
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if middle else None
        self.norm1 = _norm(WIDTH, classes) if middle else None
        self.conv2 = nn.Conv2d(WIDTH, 64, 3, padding=1)
        self.norm2 = _norm(64, classes)
        self.conv3 = nn.Conv2d(64, channels, 3, padding=1)
        self.last = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:  # (N, latent) -> (N, C, H, W)
        x = self.norm0(self.linear(z).view(-1, WIDTH, self.rows, self.columns), labels)
        if self.conv1 is not None and self.norm1 is not None:
            x = F.leaky_relu(self.norm1(upsampled_convolution(x, self.conv1), labels), SLOPE)
        x = F.leaky_relu(self.norm2(upsampled_convolution(x, self.conv2), labels), SLOPE)
        x = upsampled_convolution(x, self.conv3) if self.conv1 is None else self.conv3(x)
        return self.last(x[:, :, : self.height, : self.width].tanh())


def upsampled_convolution(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Nearest upsampling by 2 and a 3x3 convolution of padding 1, as one transposed convolution: the same function.

    Each output has 4 different neighbours among its 9, so taps that meet the same one are added beforehand: 4/9 of the
    multiplications, and no upsampled copy of `x`.

    Args:
        x: (N, C, H, W).
        conv: C channels to D; 3x3, stride 1, padding 1, neither dilated nor grouped.

    Returns:
        (N, D, 2H, 2W).
    """
    taps = F.pad(conv.weight.flip(2, 3), (1, 1, 1, 1))  # the convolution with 2x2 ones: 3x3 -> 4x4
    taps = taps[:, :, 1:] + taps[:, :, :-1]
    taps = taps[..., 1:] + taps[..., :-1]
    return F.conv_transpose2d(x, taps.transpose(0, 1), conv.bias, stride=2, padding=1)


def _norm(channels: int, classes: int | None) -> nn.Module:
    return PlainNorm(channels) if classes is None else ConditionalNorm(channels, classes)


@torch.no_grad()
def redraw(network: nn.Module, rng: torch.Generator) -> None:
    """Fill all parameters in place as torch initialises them, every draw from `rng`, a CPU generator."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())  # kaiming_uniform with a = sqrt(5)
            for parameter in (module.weight, module.bias):
                assert parameter is not None
                parameter.copy_((2 * torch.rand(parameter.shape, generator=rng) - 1) * bound)
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=rng))
        elif isinstance(module, PlainNorm):
            module.reset_parameters()
        elif isinstance(module, ConditionalNorm):
            module.scale.fill_(1.0)
            module.shift.zero_()


class LatentGenerator(nn.Module):
    """GENIE's generator: latents (N, latent) -> images (N, C, H, W)."""

    def __init__(self, input_size: tuple[int, int, int], *, latent: int = 256) -> None:
        super().__init__()
        self.trunk = Trunk(input_size, latent, middle=False)

    def reset(self, rng: torch.Generator) -> None:
        """Redraw all parameters in place."""
        redraw(self, rng)

    def forward(self, z: Tensor) -> Tensor:
        return self.trunk(z)


class ConditionalGenerator(nn.Module):
    """GDFQ's generator: latents (N, latent) and labels, probabilities (N, K), -> images (N, C, H, W).

    Args:
        input_size: (C, H, W).
        num_classes: K.
        latent: length of a latent vector.
        conditioning: "embedding": latents are multiplied with the class's embedding (CIFAR); "batch_norm": every
            normalisation has scales and shifts for each class (ImageNet).

    Raises:
        ValueError: if `conditioning` is neither.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        num_classes: int,
        *,
        latent: int = 100,
        conditioning: Conditioning = "embedding",
    ) -> None:
        super().__init__()
        self.embedding = None if by_norm(conditioning) else nn.Embedding(num_classes, latent)
        self.trunk = Trunk(input_size, latent, classes=None if self.embedding is not None else num_classes)

    def reset(self, rng: torch.Generator) -> None:
        """Redraw all parameters in place."""
        redraw(self, rng)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        if self.embedding is not None:
            z = z * (labels @ self.embedding.weight)
        return self.trunk(z, labels)


class SuperposedGenerator(nn.Module):
    """Qimera's: the label's mixture of classifier rows plus noise, normalised and reduced, -> images (N, C, H, W).

    Args:
        input_size: (C, H, W).
        classifier_weight: (K, F), frozen; a row is the embedding of a class, and noise has its length.
        latent: length of what enters the trunk: the normalised sums, mapped by a linear layer unless it is F.
        conditioning: "batch_norm": every normalisation has scales and shifts for each class too (ImageNet).

    Raises:
        ValueError: if `conditioning` is neither.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        classifier_weight: Tensor,
        *,
        latent: int,
        conditioning: Conditioning = "embedding",
    ) -> None:
        super().__init__()
        self.register_buffer("embedding", classifier_weight.detach().clone())
        classes, width = classifier_weight.shape
        self.norm = nn.BatchNorm1d(width, affine=False, track_running_stats=False)
        self.reducer = nn.Linear(width, latent) if width != latent else nn.Identity()
        self.trunk = Trunk(input_size, latent, classes=classes if by_norm(conditioning) else None)

    def reset(self, rng: torch.Generator) -> None:
        """Redraw all parameters in place."""
        redraw(self, rng)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:  # (N, F), (N, K)
        mixed = labels @ self.get_buffer("embedding")
        return self.trunk(self.reducer(self.norm(mixed + z)), labels)


def by_norm(conditioning: Conditioning) -> bool:
    """Whether classes enter through the scales and shifts of normalisations.

    Raises:
        ValueError: if `conditioning` is unknown.
    """
    if conditioning not in get_args(Conditioning):
        raise ValueError(f"conditioning: expected one of {', '.join(get_args(Conditioning))}, got {conditioning!r}")
    return conditioning == "batch_norm"
