"""ggml Q3_K: 256 columns in 16 groups with scales of 6 bits, codes of 3 bits around zero.

    codes   (N, K / 256 * 110)   uint8   blocks of 110 bytes, 3.4375 bits per weight

        h    0   32 bytes   third bits: bit b of byte i is that of column 32 b + i
        q   32   64 bytes   32 at a time hold 128 columns: lowest two bits 0-31, next 32-63 …
        s   96   12 bytes   0-7: four bits of groups 0-7 in the low nibbles, of 8-15 in the high;
                            8-11: two more bits, lowest of groups 0-3, next of 4-7 …
        d  108   float16    scale of the scales

weight = d * (s - 32) * (q + 4 h - 4)
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, joined, less, scaled

if TYPE_CHECKING:
    from torch import Tensor


def _read(blocks: "Tensor") -> "Tensor":
    third = fields(blocks[:, :32], bits=1, run=32)
    codes = joined(fields(blocks[:, 32:96], bits=2, run=32), third, bits=2)
    upper = fields(blocks[:, 104:108], bits=2, run=4)
    groups = joined(fields(blocks[:, 96:104], bits=4, run=8), upper, bits=4)
    return scaled(less(codes, 4), half(blocks, 108) * less(groups, 32))


CODEC = codec("GGML_Q3_K", _read)
