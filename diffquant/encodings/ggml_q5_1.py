"""ggml Q5_1: 32 columns share a scale and a minimum, codes of 5 bits.

    codes   (N, K / 32 * 24)   uint8   blocks of 24 bytes, 6 bits per weight

        d  0   float16    scale
        m  2   float16    minimum
        h  4   4 bytes    fifth bits, column 0 in the lowest bit of the first byte
        q  8   16 bytes   low nibbles are columns 0-15, high ones 16-31

weight = d * (q + 16 h) + m
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, joined, scaled, single_bits

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    fifth = single_bits(blocks[:, 4:8])
    codes = joined(fields(blocks[:, 8:], bits=4, run=16), fifth, bits=4)
    return scaled(codes.float(), half(blocks, 0), plus=half(blocks, 2))


CODEC = codec("GGML_Q5_1", _read)
