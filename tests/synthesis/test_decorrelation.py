"""SCI against numpy; what it is blind to, what it is not, and a gradient that survives equal eigenvalues."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from synthesis.decorrelation import Decorrelation, _Eigh
from synthesis.seeding import spawn

SCI = Decorrelation(1.0)


def batch(seed: int, n: int = 6) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(images: np.ndarray, noise: np.ndarray, form: str) -> list[float]:
    """The equation with numpy's eigenpairs, sum by sum; as released, for every choice of the eigenvectors' signs."""
    pairs = []
    for batch_ in (images, noise):
        rows = [image.ravel() / np.sqrt((image**2).sum()) for image in batch_]
        pairs.append(np.linalg.eigh(np.array([[a @ b for b in rows] for a in rows])))
    (values, vectors), (targets, directions) = pairs
    spectrum = 1e-4 * sum((a - b) ** 2 for a, b in zip(values, targets, strict=True)) / len(values)
    importance = [(target - min(targets)) / (max(targets) - min(targets)) for target in targets]
    cosines = [float(vectors[:, k] @ directions[:, k]) for k in range(len(targets))]
    if form == "aligned":
        return [spectrum + sum(i * (1 - abs(c)) for i, c in zip(importance, cosines, strict=True))]
    return [
        spectrum + abs(sum(-s * i * c for s, i, c in zip(signs, importance, cosines, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(targets))
    ]


@pytest.mark.parametrize("form", ["aligned", "released"])
def test_value_against_numpy(form: Literal["aligned", "released"]) -> None:
    images, reference = batch(5), batch(6)
    images[1] += 10 * images[0]  # much alike
    found = Decorrelation(1.0, form=form).discrepancy(images, reference).item()
    expected = written_out(images.numpy(), reference.numpy(), form)
    assert min(abs(found - value) for value in expected) < 1e-9  # the spectrum's term is about 1e-5


def test_weight_and_noise_of_the_penalty() -> None:
    images = batch(5)
    noise = torch.randn(images.shape, generator=spawn(torch.Generator().manual_seed(4), images.device))
    (expected,) = written_out(images.numpy(), noise.double().numpy(), "aligned")
    assert Decorrelation(1 / 7)(images, torch.Generator().manual_seed(4)).item() == pytest.approx(
        expected / 7, rel=1e-4
    )


def test_zero_for_the_same_gram_matrix_and_positive_otherwise() -> None:
    images = batch(0)
    assert SCI.discrepancy(images, images).item() == pytest.approx(0, abs=1e-9)
    assert SCI.discrepancy(3 * images.flip(3), images).item() == pytest.approx(0, abs=1e-9)
    assert SCI.discrepancy(batch(1), images).item() > 0.1


def test_invariant_to_a_common_permutation_and_a_common_sign() -> None:
    images, reference = batch(0), batch(1)
    expected = SCI.discrepancy(images, reference)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(SCI.discrepancy(images[order], reference[order]), expected)
    torch.testing.assert_close(SCI.discrepancy(-images, reference), expected)
    signs = torch.tensor([1, -1, 1, -1, -1, 1]).view(-1, 1, 1, 1)
    torch.testing.assert_close(SCI.discrepancy(signs * images, signs * reference), expected)


def test_gradient_agrees_with_torch_far_from_degeneracy() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0, 7.0], dtype=torch.float64))
    matrix += 0.1 * torch.ones(4, 4, dtype=torch.float64)
    target = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(eigh: object) -> Tensor:
        x = matrix.clone().requires_grad_()
        values, vectors = eigh(x)  # type: ignore[operator]
        loss = (values**2).sum() + (vectors * target).sum(0).abs().sum()
        return torch.autograd.grad(loss, x)[0]

    theirs = gradient(torch.linalg.eigh)
    torch.testing.assert_close(gradient(_Eigh.apply), (theirs + theirs.mT) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["aligned", "released"])
def test_gradient_is_finite_where_eigenvalues_coincide(form: str) -> None:
    images = torch.zeros(4, 1, 2, 2)
    images.view(4, 4).fill_diagonal_(1.0)  # the Gram matrix is the identity: all eigenvalues are equal
    for start in (images, torch.ones(4, 1, 2, 2), images + 1e-7 * torch.randn(4, 1, 2, 2)):
        x = start.clone().requires_grad_()
        loss = Decorrelation(1.0, form=form)(x, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.isfinite().all()


def test_descent_draws_the_images_to_the_reference() -> None:
    reference = batch(1)
    images = batch(0).requires_grad_()
    start = SCI.discrepancy(images, reference).item()
    optimizer = torch.optim.Adam([images], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        SCI.discrepancy(images, reference).backward()
        optimizer.step()
    assert SCI.discrepancy(images, reference).item() < 0.5 * start


def test_noise_comes_from_the_generator() -> None:
    images = batch(0).float()
    draws = [SCI(images, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_misspelt_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form"):
        Decorrelation(1.0, form="paper")  # type: ignore[arg-type]
