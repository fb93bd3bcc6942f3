"""What ggml's types share: blocks of columns that lie side by side with their own scales.

A row of K columns is K / values blocks of `width` bytes each. Nothing lies outside of them, so that
the only part of such a weight is its codes, uint8 [N, K / values * width]. Codes of one to six bits
are stored in fields of one, two or four, and the fields of some columns in one run of bytes: the
lowest field of each byte of the run in order, then the next one (`fields`).

Decoding rounds where ggml's own arithmetic in float32 does: a block's scale times the scale of a
group of its columns, that times the code, and then the group's minimum taken away. Sources: ggml's
ggml-common.h for the bytes; the gguf package, which tests hold every type against bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.encodings._scales import row_spans
from diffquant.errors import PlanError
from diffquant.headers.gguf import TYPES
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

    #: blocks uint8 [B, width] -> the columns they hold, float32 [B, values]
    Read = Callable[[Tensor], Tensor]
    #: float32 [B, values] -> blocks uint8 [B, width]
    Write = Callable[[Tensor], Tensor]

#: dtype in headers -> columns and bytes of a block.
SIZES = {dtype: (values, width) for dtype, values, width in TYPES.values()}

#: What the 4-bit codes of the IQ4 types mean, in steps of a scale: close together around zero.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

#: What E2M1 codes mean, in halves; the second zero has no sign in ggml.
E2M1_HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def codec(dtype: str, read: "Read", write: "Write | None" = None) -> Codec:
    """The codec of a ggml type, spelled as headers do; its bits per weight count the scales."""
    values, width = SIZES[dtype]

    def decode(
        parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
    ) -> "Tensor":
        from torch import empty, float32

        n, k = shape_NK
        codes = parts[Role.CODES]
        if k % values or tuple(codes.shape) != (n, k // values * width):
            raise PlanError(
                f"{dtype} codes of shape {list(codes.shape)} for a weight of {[n, k]}, "
                f"blocks of {values} columns need {[n, -(-k // values) * width]}"
            )
        # An accelerator has no cache to stay in, and each step costs it a launch.
        spans = list(row_spans(shape_NK)) if codes.device.type == "cpu" else [slice(n)]
        if len(spans) == 1:  # nothing is copied
            return read(codes.reshape(-1, width)).view(shape_NK)
        weight = empty(shape_NK, dtype=float32, device=codes.device)
        for rows in spans:
            weight[rows] = read(codes[rows].reshape(-1, width)).view(-1, k)
        return weight

    def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
        from torch import uint8

        assert write is not None, "offered only where the type can be written"
        n, k = values_NK.shape
        if k % values:
            raise PlanError(f"{dtype} stores blocks of {values} columns, the weight has {k}")
        codes = values_NK.new_empty(n, k // values * width, dtype=uint8)
        for rows in row_spans((n, k)):
            codes[rows] = write(values_NK[rows].float().reshape(-1, values)).view(
                -1, codes.shape[1]
            )
        return {Role.CODES: codes}

    return Codec(
        bits=8 * width / values,
        scales=(frozenset(),),
        scales_inside=True,
        code_dtypes=frozenset({dtype}),
        decode=decode,
        encode=None if write is None else encode,
    )


# reading -------------------------------------------------------------------------------------


def half(blocks: "Tensor", at: int) -> "Tensor":
    """The float16 number at a byte of every block, as float32 [B, 1]."""
    from torch import float16

    return _moved(blocks[:, at : at + 2]).view(float16).float()


def fields(packed: "Tensor", bits: int, run: int) -> "Tensor":
    """Bytes [B, n] as their fields of so many bits, uint8 [B, 8 / bits * n]; see above for `run`.

    Eight bytes go through at a time: what a shift brings over from a neighbour the mask takes away.
    """
    from torch import bitwise_and, int64, uint8

    word, lanes = (int64, 8) if run % 8 == 0 else (uint8, 1)
    runs = _moved(packed).view(word).view(len(packed), -1, run // lanes)
    found = runs.new_empty(len(packed), runs.shape[1], 8 // bits, run // lanes)
    mask = _in_each_byte((1 << bits) - 1, lanes)
    for place in range(8 // bits):
        bitwise_and(runs >> (place * bits), mask, out=found[:, :, place])
    return found.view(uint8).view(len(packed), -1)


def single_bits(packed: "Tensor") -> "Tensor":
    """Bytes [B, n] as their bits, lowest first, uint8 [B, 8 n]: `fields` of one bit, runs of one.

    A byte is copied to eight, bit b kept in copy b, and what is not zero there carried to its top.
    """
    from torch import int64, uint8

    words = packed.to(int64).mul_(_in_each_byte(1, 8))
    words.bitwise_and_(_signed(sum(1 << 9 * place for place in range(8))))
    words.add_(_in_each_byte(0x7F, 8)).bitwise_right_shift_(7).bitwise_and_(_in_each_byte(1, 8))
    return words.view(uint8).view(len(packed), -1)


def _moved(packed: "Tensor") -> "Tensor":
    """The bytes in memory of their own, where wider numbers may begin at the first of them."""
    from torch import contiguous_format

    return packed.clone(memory_format=contiguous_format)


def _in_each_byte(value: int, count: int) -> int:
    return _signed(int.from_bytes(bytes([value] * count), "little"))


def _signed(word: int) -> int:
    """The int64 of these 64 bits."""
    return word - (1 << 64) if word >> 63 else word


def joined(low: "Tensor", high: "Tensor", bits: int) -> "Tensor":
    """Codes of which `low` are the lowest bits, so many, and `high` the ones above; in `high`."""
    return high.mul_(1 << bits).bitwise_or_(low)


def less(codes: "Tensor", offset: int) -> "Tensor":
    """Float32 of codes below 128, less an offset; the codes are used up."""
    from torch import int8

    return codes.view(int8).sub_(offset).float()


def levels(codes: "Tensor", table: "Sequence[int]") -> "Tensor":
    """Float32 of codes that number the levels of a table."""
    from torch import float32, tensor

    meant = tensor(table, dtype=float32, device=codes.device)
    return meant.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def scaled(
    numbers: "Tensor",
    scale: "Tensor",
    *,
    plus: "Tensor | None" = None,
    minus: "Tensor | None" = None,
) -> "Tensor":
    """numbers * scale + plus - minus, in place: float32 [B, values], the others [B, groups]."""
    grouped = numbers.view(len(numbers), scale.shape[1], -1)
    grouped.mul_(scale[:, :, None])
    if plus is not None:
        grouped.add_(plus[:, :, None])
    if minus is not None:
        grouped.sub_(minus[:, :, None])
    return numbers


def six_bit_pairs(packed: "Tensor") -> tuple["Tensor", "Tensor"]:
    """The scales and minima of eight groups, float32 [B, 8] each, from the 12 bytes [B, 12] of Q4_K
    and Q5_K: the first four of either in the low six bits of bytes 0-3 and 4-7, the others in the
    nibbles of bytes 8-11 with their two highest bits on top of bytes 0-3 and 4-7.
    """
    from torch import cat

    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    late_scales = (rest & 15) | (scales >> 6 << 4)
    late_minima = (rest >> 4) | (minima >> 6 << 4)
    return cat((scales & 63, late_scales), 1).float(), cat((minima & 63, late_minima), 1).float()


# writing -------------------------------------------------------------------------------------


def reciprocal(step: "Tensor") -> "Tensor":
    """1 / step, and 0 for a step of 0: a block of zeros."""
    from torch import where

    return where(step == 0, step, 1 / step)


def halves(numbers: "Tensor") -> "Tensor":
    """Bytes [B, 2] of numbers [B, 1] as float16."""
    from torch import float16, uint8

    return numbers.to(float16).view(uint8)
