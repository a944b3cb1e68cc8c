"""OBQ: rounds a row's weights one after the other, the cheapest next, each error made good by all that are left.

Frantar and Alistarh, "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
NeurIPS 2022, arXiv 2208.11580, eq. 7 and algorithm 3. Time grows with rows x K^3 and memory with K^2 for each row
worked on, so this is for small layers; `gptq` is its fast relative with one order for all rows. As there, each group of
a convolution has a Hessian of its own, and weights of inputs that are always zero are rounded to nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantizers.affine import multiples
from quantizers.base import Quantizer
from quantizers.grid import weight_grid
from quantizers.hessian import Rows, check_percdamp, cholesky, damped, rows_of
from quantizers.ranges import Range

ELEMENTS = 2**20  # of the inverse Hessians worked on at a time: 8 MiB stay in a CPU's cache


class OBQ(Quantizer):
    """Rounds a weight so that the layer's output on given inputs is off least; nothing is learned.

    `solve` chooses the roundings (`reconstruction=closed_form` calls it); before that they are the nearest. `forward`
    uses what was chosen, so its argument gives dtype and device only.

    Args:
        weight: (C, ...) the weight to quantize.
        bits: width, 2 to 16.
        channel_axis: axis with a scale of its own per index; None for one scale.
        symmetric: whether the zero point is fixed at 0.
        range: how scale and zero point are chosen; they stay fixed.
        percdamp: what is added to the Hessian's diagonal, as a share of its mean.
        outliers_first: round a weight that stands outside the grid at once, while others can still make up for it
            (section 5 of the paper).

    Raises:
        ValueError: if `percdamp` is negative.
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
        percdamp: float = 0.01,
        outliers_first: bool = True,
    ) -> None:
        super().__init__(weight_grid(bits, symmetric=symmetric), range, weight=weight, channel_axis=channel_axis)
        self.percdamp, self.outliers_first = check_percdamp(percdamp), outliers_first
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
        inverse = torch.cholesky_inverse(cholesky(damped(hessian, self.percdamp, weight)))
        problem = rows_of(self, weight, len(inverse))
        group = torch.arange(len(weight), device=weight.device) // problem.weight.shape[1]
        flat = [t.flatten(0, 1) for t in problem]
        elements = ELEMENTS if weight.device.type == "cpu" else 128 * ELEMENTS  # a GPU needs much work at a time
        chunk = max(1, elements // inverse[0].numel())
        parts = [
            obq(
                Rows(*(t[start : start + chunk] for t in flat)),
                inverse[group[start : start + chunk]],
                self.outliers_first,
            )
            for start in range(0, len(weight), chunk)
        ]
        self.rounded.copy_(torch.cat(parts).reshape(weight.shape))


def obq(problem: Rows, inverse: Tensor, outliers_first: bool) -> Tensor:
    """The roundings, in steps from zero, (rows, K).

    Args:
        problem: the weights and their grid, (rows, K).
        inverse: of the Hessian, for each row, (rows, K, K); it is overwritten.
        outliers_first: see `OBQ`.
    """
    W, solved = problem.weight.clone(), torch.empty_like(problem.weight)
    index = torch.arange(W.shape[1], device=W.device).expand_as(W)  # where the columns left stand in the weight
    done = torch.zeros_like(W, dtype=torch.bool)
    finished = 0
    for _ in range(W.shape[1]):
        q = problem.nearest(W)
        error = W - q * problem.scale
        cost = error.square() / inverse.diagonal(dim1=1, dim2=2)
        if outliers_first:  # beyond the last level rounding errs by more than half a step
            excess = (error / problem.scale).abs()
            cost = torch.where(excess > 0.5 + 1e-9, -excess, cost)
        p = cost.masked_fill(done, torch.inf).argmin(1, keepdim=True)
        solved.scatter_(1, index.gather(1, p), q.gather(1, p))
        column = inverse.gather(2, p.unsqueeze(1).expand(-1, W.shape[1], 1)).squeeze(2)
        pivot = column.gather(1, p)
        W -= error.gather(1, p) / pivot * column
        inverse.baddbmm_((column / pivot).unsqueeze(2), column.unsqueeze(1), alpha=-1.0)
        done.scatter_(1, p, True)
        row = torch.arange(len(W), device=W.device)
        inverse[row, p.squeeze(1)] = 0.0  # exactly, so that nothing reaches a finished weight
        inverse[row, :, p.squeeze(1)] = 0.0
        finished += 1
        if 4 * finished > W.shape[1]:  # drop what is finished: the work left shrinks with the square of its columns
            left = done.int().argsort(dim=1, stable=True)[:, :-finished]
            inverse = inverse.gather(1, left.unsqueeze(2).expand(-1, -1, W.shape[1]))
            inverse = inverse.gather(2, left.unsqueeze(1).expand(-1, left.shape[1], -1))
            problem = Rows(*(t.gather(1, left) for t in problem))
            W, index, done = W.gather(1, left), index.gather(1, left), done.gather(1, left)
            finished = 0
    return solved
