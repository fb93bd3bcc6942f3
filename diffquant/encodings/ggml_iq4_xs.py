"""ggml IQ4_XS: 256 columns in 8 groups with 6-bit scales, codes of 4 bits number unequal levels.

    codes   (N, K / 256 * 136)   uint8   blocks of 136 bytes, 4.25 bits per weight

        d    0   float16     scale of the scales
        t    2   2 bytes     upper two bits of the scales, group 0 lowest in the first byte
        s    4   4 bytes     lower four bits, group 0 lowest in the first byte
        q    8   128 bytes   16 at a time hold 32 columns: low nibbles 0-15, high ones 16-31

weight = d * (s + 16 t - 32) * IQ4_LEVELS[q]
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import IQ4_LEVELS, codec, fields, half, joined, less, levels, scaled

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    upper = fields(blocks[:, 2:4], bits=2, run=1)
    groups = joined(fields(blocks[:, 4:8], bits=4, run=1), upper, bits=4)
    codes = fields(blocks[:, 8:], bits=4, run=16)
    return scaled(levels(codes, IQ4_LEVELS), half(blocks, 0) * less(groups, 32))


CODEC = codec("GGML_IQ4_XS", _read)
