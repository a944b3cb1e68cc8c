"""Sample sources that are image generators: GENIE's latents with a fresh generator, and the conditional ones.

Jeon, Lee, Kim, "GENIE", CVPR 2023, arXiv 2212.04780; Xu et al., "Generative Low-bitwidth Data Free Quantization"
(GDFQ), ECCV 2020, arXiv 2003.03603; Choi et al., "Qimera", NeurIPS 2021, arXiv 2111.02625. The networks
themselves are in `networks.image_generators`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from networks.image_generators import ConditionalGenerator, Conditioning, LatentGenerator, SuperposedGenerator
from synthesis.sources import SampleSource


class Latents(SampleSource):
    """Latent vectors and the generator that turns them into images, both optimised, fresh for each batch (GENIE-D).

    Args:
        batch_size: images that are optimised together.
        input_size: (C, H, W).
        latent: length of a latent vector.
        latent_lr: learning rate of the latents.
        generator_lr: learning rate of the generator.
    """

    def __init__(
        self,
        batch_size: int,
        input_size: tuple[int, int, int],
        *,
        latent: int = 256,
        latent_lr: float = 0.1,
        generator_lr: float = 0.01,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2, as the generator normalises over it, got {batch_size}")
        self.batch_size = batch_size
        self.latents = nn.Parameter(torch.zeros(batch_size, latent))
        self.generator = LatentGenerator(input_size, latent=latent)
        self.latent_lr = latent_lr
        self.generator_lr = generator_lr

    @torch.no_grad()
    def reset(self, rng: torch.Generator) -> None:
        self.latents.copy_(torch.randn(self.latents.shape, generator=rng))
        self.generator.reset(rng)

    def forward(self, rng: torch.Generator, labels: Tensor) -> Tensor:
        return self.generator(self.latents)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.latents], "lr": self.latent_lr},
            {"params": list(self.generator.parameters()), "lr": self.generator_lr},
        ]


class Conditional(SampleSource):
    """GDFQ's generator: fresh latents at every step, images of a given class, one training for all images.

    Args:
        batch_size: images a step.
        input_size: (C, H, W).
        latent: length of a latent vector.
        conditioning: "embedding" multiplies latents with the class's (CIFAR), "batch_norm" gives each class its own
            scales and shifts (ImageNet).
    """

    lasting = True
    generator: ConditionalGenerator | SuperposedGenerator

    def __init__(
        self,
        batch_size: int,
        input_size: tuple[int, int, int],
        *,
        latent: int = 100,
        conditioning: Conditioning = "embedding",
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size: expected at least 2, as the generator normalises over it, got {batch_size}")
        self.batch_size = batch_size
        self.input_size = input_size
        self.latent = latent
        self.drawn = latent  # length of what is drawn for an image
        self.conditioning: Conditioning = conditioning

    def bind(self, classes: int, classifier: nn.Module) -> None:
        self.generator = ConditionalGenerator(
            self.input_size, classes, latent=self.latent, conditioning=self.conditioning
        )

    def reset(self, rng: torch.Generator) -> None:
        self.generator.reset(rng)

    def forward(self, rng: torch.Generator, labels: Tensor) -> Tensor:
        z = torch.randn(len(labels), self.drawn, generator=rng).to(labels.device)
        return self.generator(z, labels)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.generator.parameters())}]


class Superposed(Conditional):
    """Qimera's generator: class embeddings are the rows of the teacher's classifier, mixed as the labels say.

    Args:
        batch_size: images a step.
        input_size: (C, H, W).
        latent: length of what enters the generator: noise and embeddings, as long as the classifier's rows, are mapped
            to it; None: as they are.
        conditioning: "batch_norm" gives each class its own scales and shifts as well (ImageNet).

    Raises:
        ValueError: when bound to a classifier that is no linear or 1x1 convolutional layer.
    """

    def __init__(
        self,
        batch_size: int,
        input_size: tuple[int, int, int],
        *,
        latent: int | None = None,
        conditioning: Conditioning = "embedding",
    ) -> None:
        super().__init__(batch_size, input_size, conditioning=conditioning)
        self.mapped_to = latent

    def bind(self, classes: int, classifier: nn.Module) -> None:
        weight = getattr(classifier, "weight", None)
        if not isinstance(weight, Tensor) or weight.flatten(1).shape[1] * classes != weight.numel():
            raise ValueError(
                f"source: expected a classifier of {classes} rows to take class embeddings from, got "
                f"{type(classifier).__name__}; use synthesis.generators.Conditional, which learns its own"
            )
        rows = weight.detach().flatten(1)
        self.drawn = rows.shape[1]
        self.latent = self.drawn if self.mapped_to is None else self.mapped_to
        self.generator = SuperposedGenerator(self.input_size, rows, latent=self.latent, conditioning=self.conditioning)
