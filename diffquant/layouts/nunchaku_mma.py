"""Nunchaku's order for SVDQuant layers: every tensor lies as its tensor-core instruction reads it.

Nominal shapes look row-major and mean nothing. N and K are padded to multiples of 128, the rank to
one of 16. Positions in the flat stored tensor, `//` and `%` on integers:

    codes        int8 [N, K / 2], a byte holds columns 2j (bits 0-3) and 2j + 1
                 byte = 4 * word + (k % 8) // 2
                 word = (n // 128 * (K // 64) + k // 64) * 1024 + n % 128 // 16 * 128
                        + n % 8 * 16 + k % 32 // 8 * 4 + n % 16 // 8 * 2 + k % 64 // 32
    block_scale  16-bit [G, N], groups of 64
                 (n // 128 * G + g) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2
    vectors      bias, smooth, channel_scale: as a 16-bit block_scale with G = 1
    block_scale  float8 [G, N], groups of 16
                 (n // 128 * (G // 4) + g // 4) * 512 + n % 8 * 64 + n % 32 // 8 * 16
                 + n % 128 // 32 * 4 + g % 4
    low rank     [C, R], C = K (down) or N (up), 16 x 16 tiles; i = r % 16, j = c % 16 for down, the
                 other way round for up
                 (c // 16 * (R // 16) + r // 16) * 256 + i % 8 * 32 + j % 8 // 2 * 8 + i // 8 * 4
                 + j // 8 * 2 + j % 2

Source: Nunchaku's and DeepCompressor's packers, checked bit for bit in both directions.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._digits import Digits
from diffquant.layouts._nibbles import as_bytes
from diffquant.layouts._padding import cropped, padded, up
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor

VECTORS = frozenset({Role.BIAS, Role.SMOOTH, Role.CHANNEL_SCALE})
SCALARS = frozenset({Role.TENSOR_SCALE, Role.INPUT_SCALE})
TILE, RANK_TILE = 128, 16


@dataclass(frozen=True, slots=True)
class Packing:
    """One tensor: its digits, its canonical shape with padding, its nominal stored shape."""

    digits: Digits
    canonical: tuple[int, ...]
    nominal: tuple[int, ...]


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The tensor in the axes of its role without padding; codes as uint8 [N, K / 2].

    Raises PlanError when the stored size is not that of whole tiles.
    """
    if role in SCALARS:
        return stored.reshape(())
    if role is Role.CODES:
        stored, shape = as_bytes(stored), (shape[0], -(-shape[1] // 2))
    packing = packing_of(role, shape, stored.element_size(), stored.numel())
    return cropped(packing.digits.undo(stored, packing.canonical), shape)


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The stored tensor in its nominal shape. Scales and smoothing are padded with 1, the rest with
    0, so that no padded input channel is divided by zero."""
    from torch import int8

    if role in SCALARS:
        return canonical.reshape(1)
    packing = packing_of(role, tuple(canonical.shape), canonical.element_size(), None)
    fill = 1.0 if role in (Role.BLOCK_SCALE, Role.CHANNEL_SCALE, Role.SMOOTH) else 0
    whole = padded(canonical, packing.canonical, fill)
    stored = packing.digits.redo(whole, packing.nominal)
    return stored.view(int8) if role is Role.CODES else stored


def packing_of(role: Role, shape: tuple[int, ...], itemsize: int, count: int | None) -> Packing:
    """How a tensor of that canonical shape is packed; `count`, the number of stored elements, tells
    how far groups and rank are padded. Raises PlanError for a role that has no such order."""
    if role is Role.CODES:
        return _codes(up(shape[0], TILE), up(shape[1], TILE // 2))
    if role in VECTORS:
        length = up(shape[0], TILE)
        return Packing(_wide_scales(length, 1).digits, (length,), (length,))
    if role is Role.BLOCK_SCALE:
        rows = up(shape[0], TILE)
        groups = up(shape[1], 8 if itemsize == 1 else 2) if count is None else count // rows
        return _narrow_scales(rows, groups) if itemsize == 1 else _wide_scales(rows, groups)
    if role is Role.LOWRANK_DOWN:
        rank, columns = _rank(shape[0], shape[1], count)
        return _down(rank, columns)
    if role is Role.LOWRANK_UP:
        rank, rows = _rank(shape[1], shape[0], count)
        return _up(rows, rank)
    raise PlanError(f"{role} has no place in Nunchaku's order")


def _rank(rank: int, channels: int, count: int | None) -> tuple[int, int]:
    """Padded rank and channels."""
    channels = up(channels, TILE)
    return (up(rank, RANK_TILE) if count is None else count // channels), channels


def _codes(rows: int, columns: int) -> Packing:
    """Columns of bytes. Stored: row tile, column tile, strip, n % 8, k % 32 // 8, half, k half, byte."""
    digits = Digits((rows // 128, columns // 32, 8, 8, 4, 2, 2, 4), (0, 2, 5, 3, 1, 6, 4, 7))
    return Packing(digits, (rows, columns), (rows, columns))


def _wide_scales(rows: int, groups: int) -> Packing:
    """Stored: row tile, group, strip, n % 8 // 2, half, n % 2."""
    digits = Digits((rows // 128, groups, 8, 4, 2, 2), (0, 2, 4, 3, 5, 1))
    return Packing(digits, (rows, groups), (groups, rows))


def _narrow_scales(rows: int, groups: int) -> Packing:
    """Stored: row tile, group tile, n % 8, n % 32 // 8, n % 128 // 32, group."""
    digits = Digits((rows // 128, groups // 4, 8, 4, 4, 4), (0, 4, 3, 2, 1, 5))
    return Packing(digits, (rows, groups), (groups, rows))


def _down(rank: int, columns: int) -> Packing:
    """Stored: column tile, rank tile, i % 8, j % 8 // 2, i half, j half, j % 2; rank is i."""
    digits = Digits((columns // 16, rank // 16, 8, 4, 2, 2, 2), (1, 4, 2, 0, 5, 3, 6))
    return Packing(digits, (rank, columns), (columns, rank))


def _up(rows: int, rank: int) -> Packing:
    """Stored: row tile, rank tile, i % 8, j % 8 // 2, i half, j half, j % 2; the row is i."""
    digits = Digits((rows // 16, rank // 16, 8, 4, 2, 2, 2), (0, 4, 2, 1, 5, 3, 6))
    return Packing(digits, (rows, rank), (rows, rank))


LAYOUT = Order(undo=undo, redo=redo)
