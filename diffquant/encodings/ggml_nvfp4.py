"""ggml NVFP4: 64 columns in 4 groups with E4M3 scales, codes are E2M1.

    codes   (N, K / 64 * 36)   uint8   blocks of 36 bytes, 4.5 bits per weight

        s  0   4 bytes    scales of the groups, E4M3 without sign; 0x7f is zero
        q  4   32 bytes   8 at a time hold 16 columns: low nibbles 0-7, high ones 8-15

weight = s * e2m1(q), made as twice the number times half the scale. There is no scale of the whole.
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import E2M1_HALVES, codec, fields, levels, scaled

if TYPE_CHECKING:
    from torch import Tensor

#: What the highest code is where it is a number, which it is for a byte with the sign bit.
HIGHEST, NONE = 480.0, 0x7F


def _read(blocks: "Tensor") -> "Tensor":
    from torch import float8_e4m3fn

    groups = blocks[:, :4]
    scale = (groups & 0x7F).view(float8_e4m3fn).float().nan_to_num_(HIGHEST)
    codes = fields(blocks[:, 4:], bits=4, run=8)
    return scaled(levels(codes, E2M1_HALVES), scale.masked_fill_(groups == NONE, 0).mul_(0.5))


CODEC = codec("GGML_NVFP4", _read)
