"""Transposed: the two axes of the role exchanged, otherwise row-major and with its options.

Low rank as [K, R], scales as [G, N], codes as [K, N]; packed codes are [K / 2, N], two columns of the
canonical tensor in a byte.
"""

from typing import TYPE_CHECKING

from diffquant.layouts import Order, row_major
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The transposed stored tensor in `shape`, contiguous. Raises PlanError when sizes disagree."""
    return row_major.undo(stored.t().contiguous(), role, shape, options)


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The stored tensor, axes exchanged."""
    return row_major.redo(canonical, role, shape, options).t().contiguous()


LAYOUT = Order(undo=undo, redo=redo)
