"""Blocks: codes as bytes, each row a number of blocks that hold some columns and their scales.

    values, bytes   of one block; 2 and 1, two codes to a byte, unless they are named

Undone, codes are uint8 [N, K / values * bytes]; what the bytes mean only the encoding knows. ggml
stores weights so.
"""

from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._nibbles import as_bytes
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor

#: Names of the options and what they are where they are left out.
DEFAULTS = (("values", "2"), ("bytes", "1"))


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Codes as rows of bytes. Raises PlanError for any other part, and where they are not as many
    as N rows of K columns take."""
    _require_codes(role)
    rows, columns = shape
    values, width = (int(dict(options).get(key, default)) for key, default in DEFAULTS)
    codes = as_bytes(stored).reshape(-1)
    wanted = -(-columns // values) * width
    if codes.numel() != rows * wanted:
        raise PlanError(
            f"{codes.numel()} bytes for a weight of {list(shape)}, blocks of {width} bytes to "
            f"{values} columns need {rows} rows of {wanted}"
        )
    return codes.view(rows, wanted)


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The bytes as one run."""
    _require_codes(role)
    return as_bytes(canonical).reshape(-1)


def _require_codes(role: Role) -> None:
    if role is not Role.CODES:
        raise PlanError(f"{role} is not stored in blocks")


LAYOUT = Order(undo=undo, redo=redo)
