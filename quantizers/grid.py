"""The integer grid of a uniform quantizer: its width, its ends, and whether its zero point is free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The integers `low..high` that a quantizer may use.

    `signed` is about the integers, not about the data: signed data on an unsigned grid has a zero point inside it.

    | signed | symmetric | integers            | zero point       | meant for                                |
    |--------|-----------|---------------------|------------------|------------------------------------------|
    | False  | False     | 0 .. 2^b - 1        | any of them      | weights and signed activations (default) |
    | True   | True      | -2^(b-1)..2^(b-1)-1 | 0                | symmetric weights and activations        |
    | False  | True      | 0 .. 2^b - 1        | 0                | activations that are never negative      |
    | True   | False     | -2^(b-1)..2^(b-1)-1 | any of them      | backends that want signed integers       |

    Args:
        bits: width, 2 to 16.
        signed: whether the integers are signed.
        symmetric: whether the zero point is fixed at 0.

    Raises:
        ValueError: if `bits` is not an integer from 2 to 16.
    """

    bits: int
    signed: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            raise ValueError(
                f"bits: expected an integer from 2 to 16, got {self.bits!r}; to leave a tensor in floating point, "
                "insert no quantizer for it"
            )

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def one_sided(self) -> bool:
        """Whether no negative number can be represented, so that the lower end of any range is zero."""
        return self.symmetric and not self.signed


def weight_grid(bits: int, *, symmetric: bool) -> Grid:
    """The grid of a weight: signed around zero, or unsigned with a free zero point."""
    return Grid(bits, signed=symmetric, symmetric=symmetric)


def activation_grid(bits: int, *, signed: bool, symmetric: bool) -> Grid:
    """The grid of an activation; `signed` says whether the operator before it can produce negative numbers.

    Never negative: unsigned from zero. Otherwise signed around zero if `symmetric`, or unsigned with a free zero point.
    """
    return Grid(bits, signed=signed and symmetric, symmetric=symmetric or not signed)
