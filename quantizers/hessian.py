"""What roundings that are solved in closed form share: the problem, one row a weight vector, and its damped Hessian.

For a layer with inputs X (a column a sample) the squared error of a row `w` is `(w - q)^T X X^T (w - q)`, so the
Hessian `H = 2 X X^T` is the same for all rows of a group. Everything here is float64.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from quantizers.base import Quantizer


@runtime_checkable
class ClosedForm(Protocol):
    """A weight quantizer whose roundings are solved for, instead of learned."""

    def solve(self, weight: Tensor, hessian: Tensor) -> None:
        """Write the roundings of `weight` (C, inputs per group, *kernel) for `hessian` (groups, K, K) of its rows."""
        ...


class Rows(NamedTuple):
    """A weight as (groups, rows of a group, K), with everything that rounds it in the same shape, in float64."""

    weight: Tensor
    scale: Tensor
    lowest: Tensor
    highest: Tensor

    def nearest(self, weight: Tensor, column: int | slice = slice(None)) -> Tensor:
        """The multiples of the scale nearest to `weight`, which stands in `column`."""
        steps = (weight / self.scale[..., column]).round()
        return torch.clamp(steps, self.lowest[..., column], self.highest[..., column])


def rows_of(quantizer: Quantizer, weight: Tensor, groups: int) -> Rows:
    """The rows of `weight`, whose output channels stand on axis 0, group by group."""
    low, high = (end - quantizer.zero_point.double() for end in (quantizer.grid.low, quantizer.grid.high))
    parts = (weight.double(), quantizer.scale.double(), low, high)
    return Rows(*(torch.broadcast_to(t, weight.shape).reshape(groups, len(weight) // groups, -1) for t in parts))


def damped(hessian: Tensor, percdamp: float, weight: Tensor) -> Tensor:
    """A positive definite copy of `hessian` (groups, K, K): `percdamp` times its mean diagonal added to the diagonal.

    An input that was always zero gets that mean on the diagonal and no share in it: its weights are rounded to nearest
    and push nothing onto others. (The released GPTQ sets them to zero, though other images may use them.)

    Raises:
        ValueError: if the shape does not fit `weight`, or an element is not finite.
    """
    columns = weight[0].numel()
    if hessian.dim() != 3 or hessian.shape[1:] != (columns, columns) or len(weight) % len(hessian):
        raise ValueError(
            f"hessian: expected (groups, {columns}, {columns}) for a weight of shape {tuple(weight.shape)} with a "
            f"divisor of {len(weight)} groups, got {tuple(hessian.shape)}"
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("hessian: expected finite numbers, got NaN or infinity; check the calibration images")
    result = hessian.to(weight.device, torch.float64, copy=True)
    diagonal = result.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    mean = (diagonal * ~dead).sum(1) / (~dead).sum(1).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0).unsqueeze(1)
    diagonal.copy_(torch.where(dead, mean, diagonal + percdamp * mean))
    return result


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor of each matrix (groups, K, K).

    Raises:
        ValueError: if one is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        raise ValueError(
            "percdamp: the Hessian is singular, as with fewer positions than inputs of a layer; "
            "use more images, or a larger damping such as 0.01"
        )
    return factor


def check_percdamp(percdamp: float) -> float:
    """`percdamp` itself. Raises ValueError if it is negative."""
    if percdamp < 0:
        raise ValueError(f"percdamp: expected 0 or more, as a share of the Hessian's mean diagonal, got {percdamp}")
    return percdamp
