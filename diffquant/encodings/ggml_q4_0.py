"""ggml Q4_0: 32 columns share a scale, codes of 4 bits around zero.

    codes   (N, K / 32 * 18)   uint8   blocks of 18 bytes, 4.5 bits per weight

        d  0   float16    scale
        q  2   16 bytes   low nibbles are columns 0-15, high ones 16-31

weight = d * (q - 8)
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, less, scaled

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    codes = fields(blocks[:, 2:], bits=4, run=16)
    return scaled(less(codes, 8), half(blocks, 0))


CODEC = codec("GGML_Q4_0", _read)
