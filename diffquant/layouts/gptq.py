"""GPTQ: 32-bit words of codes, both axes exchanged, the first code in the lowest bits.

    codes        int32 [K * bits / 32, N]   along K
    zero_point   int32 [G, N * bits / 32]   along N
    block_scale  [G, N]

    bits      4 (default) | 8
    numbers   of zero points: plain (default) | less_one: the stored one, plus 1 modulo 2^bits, is meant

Codes and zero points are 0 .. 2^bits - 1. Undone, both are less 2^(bits - 1), which their difference does
not see: codes are uint8 [N, K / 2] or int8 [N, K] in two's complement, zero points int8 [N, G].
"""

from typing import TYPE_CHECKING

from diffquant.layouts import Order, transposed, words
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor

PACKED = {Role.CODES: "columns", Role.ZERO_POINT: "rows"}


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The part in rows of the weight. Raises PlanError when it is not as large as the shape needs."""
    if role not in PACKED:
        return transposed.undo(stored, role, shape, ())
    chosen = dict(options)
    bits = chosen.get("bits", "4")
    packing = (("axis", PACKED[role]), ("bits", bits), ("numbers", "offset"))
    numbers = words.undo(stored.t(), role, shape, packing)
    less_one = role is Role.ZERO_POINT and chosen.get("numbers", "plain") == "less_one"
    return _one_more(numbers, int(bits)) if less_one else numbers


def _one_more(numbers: "Tensor", bits: int) -> "Tensor":
    """Two's complement of so many bits plus 1, int8: the largest becomes the smallest."""
    if bits == 8:
        return numbers + 1
    half = 1 << bits - 1
    return (numbers + half + 1 & 2 * half - 1) - half


LAYOUT = Order(undo=undo)
