"""Rows paired: two rows of the weight share a byte (ModelOpt INT4).

stored [N / 2, K] uint8: bits 0-3 hold the even row, bits 4-7 the odd one
"""

from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._nibbles import as_bytes, joined, split
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Columns paired, uint8 [N, K / 2].

    Raises PlanError when rows or columns cannot be paired, or the tensor holds no codes.
    """
    _require_codes(role)
    rows, columns = shape
    if tuple(stored.shape) != (rows // 2, columns) or rows % 2 or columns % 2:
        raise PlanError(
            f"{role} is stored as {list(stored.shape)}, a weight of {list(shape)} in pairs of rows "
            f"is {[rows // 2, columns]}"
        )
    codes = split(as_bytes(stored).t()).t()
    return joined(codes).contiguous()


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Rows paired, uint8 [N / 2, K]."""
    _require_codes(role)
    return joined(split(canonical).t()).t().contiguous()


def _require_codes(role: Role) -> None:
    if role is not Role.CODES:
        raise PlanError(f"{role} has no rows to pair, only 4-bit codes do")


LAYOUT = Order(undo=undo, redo=redo)
