"""Flat: one run over the whole weight, which knows nothing of rows.

    nibbles   of codes: low (default): bits 0-3 of a byte hold the earlier number | high: the later
    repeat    cells of the canonical scales that one stored scale covers, 1 by default

Codes become uint8 [N, K / 2], scales [N, G]. Where a stored scale covers more than one cell, since its
block goes on in the next group or row, it is repeated. bitsandbytes stores weights so.
"""

from math import prod
from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._nibbles import as_bytes
from diffquant.layouts.row_major import swapped
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The part in rows. Raises PlanError when the run is not as long as the shape needs, or when a
    byte of codes lies in two rows."""
    chosen = dict(options)
    if role is Role.CODES:
        _require_whole_bytes(shape)
        shape = (shape[0], shape[1] // 2)
    cells, repeat = prod(shape), int(chosen.get("repeat", "1"))
    if stored.numel() != -(-cells // repeat):
        raise PlanError(
            f"{role} is stored as {list(stored.shape)}, {list(shape)} in one run, each for "
            f"{repeat}, is {-(-cells // repeat)}"
        )
    if role is Role.CODES:
        codes = as_bytes(stored).reshape(shape)
        return swapped(codes) if chosen.get("nibbles", "low") == "high" else codes
    run = stored.reshape(-1)
    return (run if repeat == 1 else run.repeat_interleave(repeat)[:cells]).reshape(shape)


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The run: codes as bytes [N * K / 2, 1], scales as one axis, of repeated ones the first."""
    chosen = dict(options)
    if role is Role.CODES:
        _require_whole_bytes(shape)
        codes = as_bytes(canonical).reshape(-1, 1)
        return swapped(codes) if chosen.get("nibbles", "low") == "high" else codes
    return canonical.reshape(-1)[:: int(chosen.get("repeat", "1"))].contiguous()


def _require_whole_bytes(shape: tuple[int, ...]) -> None:
    if shape[1] % 2:
        raise PlanError(f"a weight of {list(shape)} has bytes that lie in two of its rows")


LAYOUT = Order(undo=undo, redo=redo)
