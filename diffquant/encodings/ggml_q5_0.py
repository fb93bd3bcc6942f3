"""ggml Q5_0: 32 columns share a scale, codes of 5 bits around zero.

    codes   (N, K / 32 * 22)   uint8   blocks of 22 bytes, 5.5 bits per weight

        d  0   float16    scale
        h  2   4 bytes    fifth bits, column 0 in the lowest bit of the first byte
        q  6   16 bytes   low nibbles are columns 0-15, high ones 16-31

weight = d * (q + 16 h - 16)
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, joined, less, scaled, single_bits

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    fifth = single_bits(blocks[:, 2:6])
    codes = joined(fields(blocks[:, 6:], bits=4, run=16), fifth, bits=4)
    return scaled(less(codes, 16), half(blocks, 0))


CODEC = codec("GGML_Q5_0", _read)
