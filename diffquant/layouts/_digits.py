"""A physical order as a permutation of digits.

A position in a tiled tensor is a number whose digits (tile, strip, lane, …) are digits of the row and
the column in another order. Splitting axes into digits and permuting them is the whole layout, in
both directions and without an index the size of the tensor.
"""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from diffquant.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Digits:
    """`stored`: sizes of the digits of a stored position, slowest first. `order`: which of them make
    up the row and then the column of the canonical tensor, slowest first."""

    stored: tuple[int, ...]
    order: tuple[int, ...]

    def undo(self, stored: "Tensor", shape: tuple[int, ...]) -> "Tensor":
        """The canonical tensor of `shape`. Raises PlanError when the stored size does not fill it."""
        if stored.numel() != prod(self.stored) or stored.numel() != prod(shape):
            raise PlanError(
                f"{list(stored.shape)} stored elements do not fill {list(shape)} in whole tiles",
                hint="is the tensor of another layout?",
            )
        return stored.reshape(self.stored).permute(self.order).reshape(shape)

    def redo(self, canonical: "Tensor", shape: tuple[int, ...]) -> "Tensor":
        """The stored tensor, in its nominal `shape`."""
        digits = canonical.reshape([self.stored[digit] for digit in self.order])
        inverse = [self.order.index(digit) for digit in range(len(self.order))]
        return digits.permute(inverse).reshape(shape)
