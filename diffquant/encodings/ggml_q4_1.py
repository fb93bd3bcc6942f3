"""ggml Q4_1: 32 columns share a scale and a minimum, codes of 4 bits.

    codes   (N, K / 32 * 20)   uint8   blocks of 20 bytes, 5 bits per weight

        d  0   float16    scale
        m  2   float16    minimum
        q  4   16 bytes   low nibbles are columns 0-15, high ones 16-31

weight = d * q + m
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, scaled

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    codes = fields(blocks[:, 4:], bits=4, run=16)
    return scaled(codes.float(), half(blocks, 0), plus=half(blocks, 2))


CODEC = codec("GGML_Q4_1", _read)
