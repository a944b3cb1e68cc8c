"""GPTQ: rounds a layer's weights column by column, each error made good by the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, arXiv
2210.17323, algorithm 1. We deviate in three places. Each group of a grouped or depthwise convolution has a Hessian of
its own, where the released code breaks. Weights of inputs that are always zero are rounded to nearest, not set to zero.
The factor of the inverse comes from one Cholesky decomposition, from the last column to the first, without inverting H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.affine import multiples
from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.hessian import Rows, check_percdamp, cholesky, damped, rows_of
from quantizers.ranges import Range


class GPTQ(Quantizer):
    """Rounds a weight so that the layer's output on given inputs is off least; nothing is learned.

    `solve` chooses the roundings (`reconstruction=closed_form` calls it); before that they are the nearest. `forward`
    uses what was chosen, so its argument gives dtype and device only.

    Args:
        weight: (C, ...) the weight to quantize.
        bits: width, 2 to 16.
        channel_axis: axis with a scale of its own per index; None for one scale.
        symmetric: whether the zero point is fixed at 0.
        range: how scale and zero point are chosen; they stay fixed.
        block: columns whose errors are passed on at once; it changes time, and numbers by float64 rounding only.
        percdamp: what is added to the Hessian's diagonal, as a share of its mean.
        actorder: columns with the largest inputs first, instead of as they stand.

    Raises:
        ValueError: if `block` or `percdamp` is out of its range.
    """

    rounded: Tensor  # q - z

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        channel_axis: int | None = 0,
        symmetric: bool = False,
        range: Range,
        block: int = 128,
        percdamp: float = 0.01,
        actorder: bool = False,
    ) -> None:
        super().__init__(weight_grid(bits, symmetric=symmetric), range, weight=weight, channel_axis=channel_axis)
        if block < 1:
            raise ValueError(f"block: expected at least 1 column, got {block}; 128 is usual")
        self.block, self.percdamp, self.actorder = block, check_percdamp(percdamp), actorder
        self.register_buffer("rounded", torch.zeros_like(weight, dtype=torch.float32))
        self.initialize(weight)

    def initialize_state(self, x: Tensor) -> None:
        """Round to nearest for the range that was set."""
        self.rounded.copy_(multiples(x, self.scale, self.zero_point, self.grid))

    def multiples(self, x: Tensor) -> Tensor:
        """`q - z`, shape of the weight."""
        return self.rounded

    @torch.no_grad()
    def solve(self, weight: Tensor, hessian: Tensor) -> None:
        """Choose the roundings of `weight` (C, inputs per group, *kernel) for inputs with `hessian` (groups, K, K).

        Raises:
            ValueError: if the Hessian does not fit the weight, is not finite, or singular without damping.
        """
        H = damped(hessian, self.percdamp, weight)
        problem = rows_of(self, weight, len(H))
        order = torch.arange(H.shape[-1], device=H.device).expand(len(H), -1)
        if self.actorder:
            order = H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        H = H.gather(1, order.unsqueeze(2).expand_as(H)).gather(2, order.unsqueeze(1).expand_as(H))
        columns = order.unsqueeze(1).expand_as(problem.weight)
        solved = gptq(Rows(*(t.gather(2, columns) for t in problem)), inverse_factor(H), block=self.block)
        self.rounded.copy_(torch.empty_like(solved).scatter_(2, columns, solved).reshape(weight.shape))


def inverse_factor(H: Tensor) -> Tensor:
    """The upper triangular U with `U^T U = H^-1`, (groups, K, K); row i belongs to the inverse without columns < i."""
    M = cholesky(H.flip(1, 2)).flip(1, 2)  # upper, H = M M^T
    identity = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device).expand_as(H)
    return torch.linalg.solve_triangular(M, identity, upper=True)


def gptq(problem: Rows, U: Tensor, *, block: int) -> Tensor:
    """The roundings, in steps from zero, (groups, rows, K), columns in the order in which they stand.

    Args:
        problem: the weights and their grid.
        U: upper factor of the inverse Hessian, (groups, K, K).
        block: columns whose errors are passed on at once.
    """
    W, count = problem.weight.clone(), problem.weight.shape[-1]
    solved = torch.empty_like(W)
    for start in range(0, count, block):
        end = min(start + block, count)
        errors = torch.empty_like(W[..., start:end])
        for i in range(start, end):
            q = problem.nearest(W[..., i], i)
            error = (W[..., i] - q * problem.scale[..., i]) / U[:, i, i].unsqueeze(1)
            W[..., i + 1 : end] -= error.unsqueeze(2) * U[:, i, i + 1 : end].unsqueeze(1)
            solved[..., i], errors[..., i - start] = q, error
        W[..., end:] -= errors @ U[:, start:end, end:]
    return solved
