"""ggml Q2_K: 256 columns in 16 groups with 4-bit scales and minima, codes of 2 bits.

    codes   (N, K / 256 * 84)   uint8   blocks of 84 bytes, 2.625 bits per weight

        s    0   16 bytes   of each group: its scale in the low nibble, its minimum in the high one
        q   16   64 bytes   32 at a time hold 128 columns: lowest two bits 0-31, next 32-63 …
        d   80   float16    scale of the scales
        m   82   float16    scale of the minima

weight = d * (s & 15) * q - m * (s >> 4)
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, scaled

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    groups = blocks[:, :16]
    codes = fields(blocks[:, 16:80], bits=2, run=32)
    return scaled(
        codes.float(),
        half(blocks, 80) * (groups & 15).float(),
        minus=half(blocks, 82) * (groups >> 4).float(),
    )


CODEC = codec("GGML_Q2_K", _read)
