"""ggml Q4_0: 32 columns share a scale, codes of 4 bits around zero.

    codes   (N, K / 32 * 18)   uint8   blocks of 18 bytes, 4.5 bits per weight

        d  0   float16    scale
        q  2   16 bytes   low nibbles are columns 0-15, high ones 16-31

weight = d * (q - 8). Written as ggml does: d is -1/8 of the number of largest magnitude, which so
has code 0, and codes are rounded half up.
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, fields, half, halves, less, reciprocal, scaled

if TYPE_CHECKING:
    from torch import Tensor

#: The code of zero; columns that low nibbles hold.
ZERO, RUN = 8, 16


def _read(blocks: "Tensor") -> "Tensor":
    codes = fields(blocks[:, 2:], bits=4, run=RUN)
    return scaled(less(codes, ZERO), half(blocks, 0))


def _write(values: "Tensor") -> "Tensor":
    from torch import cat, uint8

    largest = values.gather(1, values.abs().argmax(1, keepdim=True))
    step = largest / -ZERO
    codes = (values * reciprocal(step) + (ZERO + 0.5)).trunc().clamp_(0, 15).to(uint8)
    low, high = codes[:, :RUN], codes[:, RUN:]
    return cat((halves(step), low | high << 4), 1)


CODEC = codec("GGML_Q4_0", _read, _write)
