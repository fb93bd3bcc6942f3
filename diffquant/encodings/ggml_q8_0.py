"""ggml Q8_0: 32 columns share a scale, codes of 8 bits.

    codes   (N, K / 32 * 34)   uint8   blocks of 34 bytes, 8.5 bits per weight

        d  0   float16   scale
        q  2   32 int8

weight = d * q. Written with d = amax / 127 and q rounded half away from zero, as ggml does.
"""

from typing import TYPE_CHECKING

from diffquant.encodings._ggml import codec, half, halves, reciprocal, scaled

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 127


def _read(blocks: "Tensor") -> "Tensor":
    from torch import int8

    return scaled(blocks[:, 2:].view(int8).float(), half(blocks, 0))


def _write(values: "Tensor") -> "Tensor":
    from torch import cat, int8, uint8

    step = values.abs().amax(1, keepdim=True) / LARGEST
    steps = values * reciprocal(step)
    codes = steps.trunc() + (2 * steps.frac()).trunc()
    return cat((halves(step), codes.to(int8).view(uint8)), 1)


CODEC = codec("GGML_Q8_0", _read, _write)
