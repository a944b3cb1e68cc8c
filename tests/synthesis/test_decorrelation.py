"""SCI: what it is blind to, what it is not, and a gradient that survives equal eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthesis.decorrelation import Decorrelation, _Eigh

SCI = Decorrelation(1.0)


def batch(seed: int, n: int = 6) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
