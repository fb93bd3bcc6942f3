"""Words: codes of 4 or 8 bits packed into 32-bit integers, the first code in the lowest bits.

    axis     columns (default): [N, ceil(K * bits / 32)] | rows: [ceil(N * bits / 32), G] zero points
    bits     4 (default) | 8
    numbers  signed (default): two's complement | offset: the number plus 2^(bits - 1)

What fills the last word of a row, or of a column, is dropped. Codes become those of `layouts`, zero
points one int8 each, as many columns of them as are stored. Source: compressed-tensors 0.20,
`pack_to_int32`, whose numbers are `offset`.
"""

from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._nibbles import as_bytes, joined, split
from diffquant.layouts._padding import cropped, padded, up
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor

#: Flips the highest bit of every code of a byte: offset numbers to two's complement and back.
FLIP = {4: 0x88, 8: 0x80}


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """Codes as uint8 [N, ceil(K / 2)] or int8 [N, K], zero points as int8 [N, G].

    Raises PlanError for any other role, and where the words are not as many as the shape needs.
    """
    bits, in_rows = _meant(role, options)
    length = shape[0] if in_rows else shape[1]
    words = stored.t() if in_rows else stored
    wanted = (words.shape[0] if in_rows else shape[0], -(-length * bits // 32))
    if tuple(words.shape) != wanted or stored.element_size() != 4:
        raise PlanError(
            f"{role} is stored as {list(stored.shape)} of {stored.dtype}, {list(shape)} in "
            f"{bits}-bit codes is {list(wanted[::-1] if in_rows else wanted)} words"
        )
    packed = _flipped(as_bytes(words), bits, options)
    if role is Role.CODES:
        return _signed(cropped(packed, (wanted[0], -(-length * bits // 8))), bits)
    numbers = _numbers(packed, bits)
    return cropped(numbers, (wanted[0], length)).t().contiguous()


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The words, int32; what the last ones have no code for is zero."""
    import torch

    bits, in_rows = _meant(role, options)
    packed = as_bytes(canonical)
    if role is not Role.CODES:
        numbers = canonical.reshape(len(canonical), -1).t().to(torch.int8)
        packed = _packed(as_bytes(numbers), bits)
    packed = _flipped(packed, bits, options)
    words = padded(packed, (packed.shape[0], up(packed.shape[1], 4))).view(torch.int32)
    return words.t().contiguous() if in_rows else words


def _meant(role: Role, options: Options) -> tuple[int, bool]:
    """Bits per code, and whether they run along rows."""
    chosen = dict(options)
    in_rows = chosen.get("axis", "columns") == "rows"
    if role is not (Role.ZERO_POINT if in_rows else Role.CODES):
        raise PlanError(f"{role} is not packed into words along {'rows' if in_rows else 'columns'}")
    return int(chosen.get("bits", "4")), in_rows


def _flipped(packed: "Tensor", bits: int, options: Options) -> "Tensor":
    return packed ^ FLIP[bits] if dict(options).get("numbers", "signed") == "offset" else packed


def _signed(packed: "Tensor", bits: int) -> "Tensor":
    """Whole bytes are int8; pairs of codes stay bytes."""
    import torch

    return packed.view(torch.int8) if bits == 8 else packed


def _numbers(packed: "Tensor", bits: int) -> "Tensor":
    """One int8 per code."""
    import torch

    if bits == 8:
        return packed.view(torch.int8)
    return (split(packed) ^ 8).view(torch.int8) - 8


def _packed(numbers: "Tensor", bits: int) -> "Tensor":
    """Bytes of codes from one byte per number."""
    if bits == 8:
        return numbers
    return joined(padded(numbers & 15, (numbers.shape[0], up(numbers.shape[1], 2))))


LAYOUT = Order(undo=undo, redo=redo)
