"""Spatial correlation inhibition (SCI): the Gram spectrum of the images is drawn to that of Gaussian noise.

Qin et al., "Diverse Sample Generation: Pushing the Limit of Generative Data-Free Quantization", TPAMI 2023,
arXiv 2109.00212, a GDPP loss (Elfeki et al., ICML 2019, arXiv 1812.00068) on pixels. We differ from the released code,
whose eigenvectors are unsorted and of arbitrary sign: ours are sorted, and |<e_f, e_r>| is drawn to 1.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from synthesis.priors import Prior
from synthesis.seeding import spawn
from synthesis.views import View

SPECTRUM_WEIGHT = 1e-4
DEGENERATE = 1e-4  # eigenvalues closer than this (the Gram matrix has a unit diagonal) exchange no gradient


class _Eigh(torch.autograd.Function):
    """`torch.linalg.eigh` whose gradient stays bounded when eigenvalues meet.

    The exact gradient holds 1 / (l_j - l_i); here it is d / (d^2 + DEGENERATE^2), equal far from degeneracy.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:  # (N, N) -> (N,), (N, N)
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        grad_values, grad_vectors = gradients
        difference = values[None, :] - values[:, None]
        factor = difference / (difference.square() + DEGENERATE**2)
        inner = torch.diag(grad_values) + factor * (vectors.mT @ grad_vectors)
        gradient = vectors @ inner @ vectors.mT
        return (gradient + gradient.mT) / 2


class Decorrelation(Prior):
    """L = 1e-4 MSE(lambda_f, lambda_r) + sum_k minmax(lambda_r)_k (1 - |<e_f_k, e_r_k>|).

    "f" are the eigenpairs of the Gram matrix of the L2-normalised images, "r" those of a fresh N(0, 1) batch.

    Args:
        weight: the papers use 1 / L, with L the number of BatchNorm layers.
        view: what the penalty sees of the images.
        form: "aligned" as above, or "released": |sum_k minmax(lambda_r)_k (-<e_f_k, e_r_k>)| as in the released code,
            which rewards no alignment and depends on the arbitrary signs of eigenvectors.
    """

    def __init__(
        self, weight: float, view: View | None = None, *, form: Literal["aligned", "released"] = "aligned"
    ) -> None:
        if form not in ("aligned", "released"):
            raise ValueError(f"form: expected 'aligned' or 'released', got {form!r}")
        super().__init__(weight, view)
        self.form = form

    def penalty(self, images: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(images.shape, generator=spawn(rng, images.device), device=images.device)
        return self.discrepancy(images, noise)

    def discrepancy(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of images (N, C, H, W) against reference images of the same shape."""
        values, vectors = _Eigh.apply(_gram(images))  # type: ignore[misc]
        reference_values, reference_vectors = torch.linalg.eigh(_gram(reference))
        span = reference_values[-1] - reference_values[0]
        importance = (reference_values - reference_values[0]) / span.clamp_min(torch.finfo(span.dtype).tiny)
        cosines = (vectors * reference_vectors).sum(0)
        spectrum = SPECTRUM_WEIGHT * F.mse_loss(values, reference_values)
        if self.form == "released":
            return spectrum + (importance * cosines).sum().abs()
        return spectrum + (importance * (1 - cosines.abs())).sum()


def _gram(images: Tensor) -> Tensor:  # (N, C, H, W) -> (N, N), ones on the diagonal
    rows = F.normalize(images.flatten(1).float() if images.dtype != torch.float64 else images.flatten(1), dim=1)
    return rows @ rows.mT
