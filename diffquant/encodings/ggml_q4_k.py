"""ggml Q4_K: 256 columns in 8 groups with 6-bit scales and minima, codes of 4 bits.

    codes   (N, K / 256 * 144)   uint8   blocks of 144 bytes, 4.5 bits per weight

        d    0   float16     scale of the scales
        m    2   float16     scale of the minima
        s    4   12 bytes    scales and minima, see `six_bit_pairs`
        q   16   128 bytes   32 at a time hold 64 columns: low nibbles 0-31, high ones 32-63

weight = d * scale * q - m * minimum
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, scaled, six_bit_pairs

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    scales, minima = six_bit_pairs(blocks[:, 4:16])
    codes = fields(blocks[:, 16:], bits=4, run=32)
    return scaled(codes.float(), half(blocks, 0) * scales, minus=half(blocks, 2) * minima)


CODEC = codec("GGML_Q4_K", _read)
