"""ggml MXFP4: 32 columns share a power of two, codes are E2M1.

    codes   (N, K / 32 * 17)   uint8   blocks of 17 bytes, 4.25 bits per weight

        e  0   1 byte     exponent: the power is 2^(e - 127), 255 is no NaN here
        q  1   16 bytes   low nibbles are columns 0-15, high ones 16-31

weight = 2^(e - 127) * e2m1(q), made as twice the number times half the power.
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import E2M1_HALVES, codec, fields, levels, scaled

if TYPE_CHECKING:
    from torch import Tensor

#: The bits of 2^-128, which is below the smallest normal float32 as 2^-127 is.
SMALLEST = 0x0020_0000


def _read(blocks: "Tensor") -> "Tensor":
    from torch import float32, int32, where

    exponent = blocks[:, :1].to(int32)
    half_power = where(exponent < 2, SMALLEST << exponent.clamp(max=1), (exponent - 1) << 23)
    codes = fields(blocks[:, 1:], bits=4, run=16)
    return scaled(levels(codes, E2M1_HALVES), half_power.view(float32))


CODEC = codec("GGML_MXFP4", _read)
