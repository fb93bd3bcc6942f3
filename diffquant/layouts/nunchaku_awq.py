"""Nunchaku's order for AWQ W4A16 layers (modulation; as int16 the T5 encoder).

    codes        int32 [N / 4, K / 2] or int16 [N / 4, K], the same bytes
                 16-bit column h = k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8 of row n // 4,
                 in it bits 4 * (k % 32 // 8) and up
    block_scale, zero_point  [G, N] in plain order; rows beyond G (padding to 16) are dropped
    bias         [N] in plain order

Source: Nunchaku's AWQ packer, checked bit for bit in both directions.
"""

from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order, row_major
from diffquant.layouts._digits import Digits
from diffquant.layouts._nibbles import as_bytes, joined, split
from diffquant.layouts._padding import cropped
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Codes as uint8 [N, K / 2]; scales and zeros as [N, G]; vectors as they are.

    Raises PlanError when N is no multiple of 4, K none of 64, or the sizes disagree.
    """
    if role is Role.CODES:
        nibbles = split(as_bytes(stored).reshape(-1))
        return joined(digits(shape).undo(nibbles, shape)).contiguous()
    if len(shape) == 2:
        return cropped(stored.t().contiguous(), shape)
    return row_major.undo(stored, role, shape, options)


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Codes as int32 [N / 4, K / 2]; scales and zeros as [G, N] without padding."""
    from torch import int32

    if role is Role.CODES:
        rows, columns = shape
        stored = digits(shape).redo(split(canonical), (rows // 4, 4 * columns))
        return joined(stored).contiguous().view(int32)
    return canonical.t().contiguous() if canonical.ndim == 2 else canonical


def digits(shape: tuple[int, ...]) -> Digits:
    """Of 4-bit codes. Stored: row, column tile, n % 4, k % 64 // 32, k % 8, k % 32 // 8."""
    rows, columns = shape
    if rows % 4 or columns % 64:
        raise PlanError(
            f"a weight of {[rows, columns]} is not in Nunchaku's AWQ order, which needs rows in fours "
            "and columns in 64s"
        )
    return Digits((rows // 4, columns // 64, 4, 2, 8, 4), (0, 2, 1, 3, 5, 4))


LAYOUT = Order(undo=undo, redo=redo)
