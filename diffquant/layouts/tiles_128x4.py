"""Tiles of 128 rows x 4 columns: the order in which tensor cores read block scales ("swizzled").

Rows are padded to a multiple of 128 and columns to one of 4 (some exporters: 16). With R x C the
padded matrix, the scale of row m and column k lies at

    ((m // 128) * (C // 4) + k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4

Stored flat or in the padded two-dimensional shape, which where nothing was padded looks exactly like
row-major. Source: cuBLAS block scaling layout; comfy-kitchen and ModelOpt write it.
"""

from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._digits import Digits
from diffquant.layouts._padding import cropped, padded, up
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Row-major [rows, columns] without padding.

    Raises PlanError when they do not fit in, or the tensor is no block scale.
    """
    _require_block_scale(role)
    rows = up(shape[0], 128)
    if stored.ndim == 2 and stored.shape[0] % 128 == 0:
        rows = stored.shape[0]
    columns = stored.numel() // rows
    if columns % 4 or columns < shape[1] or rows * columns != stored.numel():
        raise PlanError(
            f"{role} is stored as {list(stored.shape)}, which holds no {list(shape)} in 128 x 4 tiles",
            hint="--scale-layout linear",
        )
    whole = digits(rows, columns).undo(stored, (rows, columns))
    return cropped(whole, shape)


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Tiles in the padded two-dimensional shape, padded with zeros."""
    _require_block_scale(role)
    whole = (up(shape[0], 128), up(shape[1], 4))
    return digits(*whole).redo(padded(canonical, whole), whole)


def digits(rows: int, columns: int) -> Digits:
    """Stored: row tile, column tile, row of 32, quarter, column. Rows: tile, quarter, row."""
    return Digits((rows // 128, columns // 4, 32, 4, 4), (0, 3, 2, 1, 4))


def _require_block_scale(role: Role) -> None:
    if role is not Role.BLOCK_SCALE:
        raise PlanError(f"{role} does not come in 128 x 4 tiles, only block scales do")


LAYOUT = Order(undo=undo, redo=redo)
