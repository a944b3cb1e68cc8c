"""A protocol says which tensors are quantized and at which width the ends of the network stand.

Published tables follow different protocols, and their numbers must not be compared across them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Placement = Literal["relu", "block_output", "layer_input", "operands"]
FLOAT = 32  # the width that means: not quantized


def check_width(name: str, bits: int) -> int:
    """Returns `bits` if it is 2 to 16, or 32 for float; raises ValueError naming `name` otherwise."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (2 <= bits <= 16 or bits == FLOAT):
        raise ValueError(
            f"{name}: expected an integer from 2 to 16, or 32 for float, got {bits!r}. "
            "One-bit grids and widths between 17 and 31 are not supported."
        )
    return bits


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """placement: "relu" quantizes the result of every activation function; "block_output" the tensors that layers read,
    where they are produced (residual sums once, behind the addition); "layer_input" the direct input of every layer;
    "operands" all that layers, sums, products, concatenations, mean pooling and the like read, both sides of a sum too,
    so that runtimes compute everything but the output in integers.

    The widths of the first and last layer's weights, of the tensor made by the first layer, of the tensor read by the
    last, and (`operand`, for "operands") of tensors that no layer reads: None is the job's own width. `image`: the
    width of the network's input, None leaves it float. `symmetric_weights`: zero points of weights are fixed at 0.
    `power_of_two`: all scales are powers of two, for hardware that shifts instead of multiplying; none can be learned.
    """

    name: str
    placement: Placement
    first_weight: int | None = None
    last_weight: int | None = None
    first_output: int | None = None
    last_input: int | None = None
    image: int | None = None
    operand: int | None = None
    symmetric_weights: bool = False
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"protocol.placement: expected one of {', '.join(get_args(Placement))}, got {self.placement!r}. "
                "See conf/protocol for complete protocols."
            )
        for field in ("first_weight", "last_weight", "first_output", "last_input", "image", "operand"):
            width = getattr(self, field)
            if width is not None:
                check_width(f"protocol.{field}", width)
