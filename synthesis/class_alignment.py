"""Statistics of each class, from a few labelled real images, and how far those of generated images are from them.

Zhong, Lin et al., "Fine-grained Data Distribution Alignment for Post-Training Quantization" (FDDA), ECCV 2022, arXiv
2109.04186. Ours: any number of images a class, and distortions relative to a layer's deviation (the published ones are
absolute, so that their strength differs from layer to layer).
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthesis.moments import Moments, exactly

log = logging.getLogger(__name__)

Part = tuple[slice, slice]  # channels and their layers


class ClassCentres(NamedTuple):
    """What the images of each class look like inside a network.

    Attributes:
        moments: (K, sum of C); mean and biased variance, zero for classes without an image.
        known: (K,) bool, whether there is an image of the class.
        trusted: (K,) bool, whether the network classifies one of them correctly.
    """

    moments: Moments
    known: Tensor
    trusted: Tensor


def class_centres(samples: Moments, labels: Tensor, logits: Tensor) -> ClassCentres:
    """Pool the moments of single images class by class.

    Misclassified images count only where a class has no other. Classes without an image are named in a warning.

    Args:
        samples: (N, sum of C), a row an image.
        labels: (N,) int64.
        logits: (N, K), what the network says of the images.

    Raises:
        ValueError: if there is no image, or a label is no class.
    """
    classes = logits.shape[1]
    expect_classes(labels, classes)
    member = F.one_hot(labels, classes).to(samples.mean)  # (N, K)
    right = member * (logits.argmax(1) == labels).unsqueeze(1)
    known, trusted = member.sum(0) > 0, right.sum(0) > 0
    share = torch.where(trusted, right, member)
    share = (share / share.sum(0).clamp_min(1)).mT  # (K, N), rows sum to 1
    mean = share @ samples.mean
    var = share @ (samples.var + (samples.mean - mean[labels]).square())
    missing = (~known).nonzero().flatten().tolist()
    if missing:
        log.warning("no real image of %d of %d classes, which get no centre: %s", len(missing), classes, missing)
    return ClassCentres(Moments(mean, var), known, trusted)


def expect_classes(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no class of a network with so many.

    Raises:
        ValueError: saying so, or if there is no label.
    """
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels: expected at least one, from 0 to {classes - 1}, got {len(labels)}: "
            f"{labels.unique().tolist()[:8]}; choose images of the classes that the network was trained on"
        )


def first_deep_layer(layers: int) -> int:
    """The first of `layers` that counts as deep: int((L + 1) / 2) - 2, as released; at least 0."""
    return max((layers + 1) // 2 - 2, 0)


class ClassAlignment(nn.Module):
    """BNS-centralized and BNS-distorted loss of a batch of one class: means over the deep layers.

    C = mean_l [ MSE(m_l, mu_lc) + MSE(v_l, v_lc) ];  D the same against mu_lc + N(0, a), v_lc + N(0, b), the noise
    drawn anew at each call. A batch of a class that is known but not trusted is drawn to noise alone, in all layers:
    D = 2 mean_l [ MSE(m_l, N(0, 1)) + MSE(v_l, N(0, 1)) ], and no C, as released.

    Args:
        centres: of all layers, side by side as they are executed.
        sizes: channels of each layer.
        central: weight of C (0.05 in the paper, 0.01 as released); 0 leaves it out.
        distorted: weight of D; 0 leaves it out.
        mean_noise: a, a standard deviation.
        var_noise: b, a standard deviation.
        relative: multiply a by the layer's deviation, the root of its mean variance, and b by its square.

    Raises:
        ValueError: if a number is negative, or the sizes do not fit the centres.
    """

    mean: Tensor
    var: Tensor
    segments: Tensor  # (sum of C, L), of all layers

    def __init__(
        self,
        centres: ClassCentres,
        sizes: list[int],
        *,
        central: float = 0.05,
        distorted: float = 0.9,
        mean_noise: float = 0.5,
        var_noise: float = 1.0,
        relative: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {
            "central": central, "distorted": distorted, "mean_noise": mean_noise, "var_noise": var_noise
        }.items():  # fmt: skip
            if value < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if sum(sizes) != centres.moments.mean.shape[1]:
            raise ValueError(f"sizes: expected {centres.moments.mean.shape[1]} channels in all, got {sum(sizes)}")
        self.central, self.distorted, self.relative = central, distorted, relative
        self.mean_noise, self.var_noise = mean_noise, var_noise
        first = first_deep_layer(len(sizes))
        self.columns = slice(sum(sizes[:first]), sum(sizes))
        self.deep: Part = self.columns, slice(first, len(sizes))
        self.every: Part = slice(0, sum(sizes)), slice(0, len(sizes))
        device = centres.moments.mean.device
        segments = torch.block_diag(*(torch.ones(size, 1) for size in sizes)).to(device)
        tensors = {"mean": centres.moments.mean[:, self.columns], "var": centres.moments.var[:, self.columns]}
        for name, value in (tensors | {"segments": segments}).items():
            self.register_buffer(name, value.clone(), persistent=False)
        self.known: list[int] = centres.known.nonzero().flatten().tolist()
        self.trusted: list[int] = centres.trusted.nonzero().flatten().tolist()

    def draw(self, rng: torch.Generator, *, untrusted: bool) -> int:
        """A class to make a batch of: any known one, or a trusted one (a known one where none is)."""
        among = self.known if untrusted or not self.trusted else self.trusted
        return among[int(torch.randint(len(among), (), generator=rng))]

    def forward(self, seen: Moments, label: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Return the weighted terms, scalars, that are not left out.

        Args:
            seen: (1, sum of C) of all layers; further columns behind them are not looked at.
            label: the class.
            rng: of the noise, a CPU generator.
        """
        if label not in self.trusted:
            return self._towards_noise(seen, rng)
        terms: dict[str, Tensor] = {}
        with exactly(seen.mean):
            centre = Moments(self.mean[label], self.var[label])
            noise = torch.randn(2, len(centre.mean), generator=rng).to(seen.mean.device)
            scale = self._deviation(centre.var) if self.relative else torch.ones_like(centre.var)
            far = Moments(
                centre.mean + self.mean_noise * scale * noise[0],
                centre.var + self.var_noise * scale.square() * noise[1],
            )
            for name, weight, goal in (("central", self.central, centre), ("distorted", self.distorted, far)):
                if weight:
                    terms[name] = weight * self._distance(seen, goal, self.deep)
        return terms

    def _towards_noise(self, seen: Moments, rng: torch.Generator) -> dict[str, Tensor]:
        if not self.distorted:
            return {}
        with exactly(seen.mean):
            noise = torch.randn(2, len(self.segments), generator=rng).to(seen.mean.device)
            return {"distorted": 2 * self.distorted * self._distance(seen, Moments(*noise), self.every)}

    def _distance(self, seen: Moments, goal: Moments, part: Part) -> Tensor:
        """Squared differences, averaged over the channels of each layer and then over layers."""
        columns, _ = part
        apart = (seen.mean[0, columns] - goal.mean).square() + (seen.var[0, columns] - goal.var).square()
        return self._layerwise(apart, part).mean()

    def _layerwise(self, values: Tensor, part: Part) -> Tensor:  # a number a channel -> a number a layer
        segments = self.segments[part]
        return (values @ segments) / segments.sum(0)

    def _deviation(self, var: Tensor) -> Tensor:  # of the deep channels, equal within a layer
        return self.segments[self.deep] @ self._layerwise(var, self.deep).sqrt()
