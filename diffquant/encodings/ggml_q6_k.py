"""ggml Q6_K: 256 columns in 16 groups with scales of 8 bits, codes of 6 bits around zero.

    codes   (N, K / 256 * 210)   uint8   blocks of 210 bytes, 6.5625 bits per weight

        q    0   128 bytes   64 at a time hold 128 columns: low nibbles 0-63, high ones 64-127
        h  128   64 bytes    two more bits, 32 at a time for 128 columns: lowest 0-31, next 32-63 …
        s  192   16 int8     scales of the groups
        d  208   float16     scale of the scales

weight = d * s * (q + 16 h - 32)
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, joined, less, scaled

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    from torch import int8

    upper = fields(blocks[:, 128:192], bits=2, run=32)
    codes = joined(fields(blocks[:, :128], bits=4, run=64), upper, bits=4)
    return scaled(less(codes, 32), half(blocks, 208) * blocks[:, 192:208].view(int8).float())


CODEC = codec("GGML_Q6_K", _read)
