"""Asymmetric W4A8: 4-bit codes that name int8 steps, so that an int8 product can run on them.

    codes           (N, K / 2)  uint8            indices 0..15; bits 0-3 hold the even column
    block_scale     (N, G)      e4m3 or float32  int8 steps per level; groups of K / G, usually 16
    channel_scale   (N,)        float32          multiplies the int8 steps
    codebook        (16,)       float32          the levels; absent means -8 .. 7
    correction      (N, G)      float            added at the end; absent means none

The product level * block_scale is rounded to an integer and held within +-127: that integer, and
not the product, is what the weight means. e4m3 may also come as its bytes, uint8.
Source: comfy-kitchen (`AsymW4A8Int8Layout`), its eager decoder.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import Codec
from diffquant.encodings._nibbles import pair_table, unpacked
from diffquant.encodings._scales import Grid, as_e4m3, group_grid, row_spans
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = tuple(float(level) for level in range(-8, 8))
LARGEST = 127.0


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = round(level * block_scale) * channel_scale + correction, float32."""
    from torch import empty, float32, uint8

    codes = parts[Role.CODES].view(uint8)
    relative = group_grid(as_e4m3(parts[Role.BLOCK_SCALE]).float(), shape_NK)
    channel = parts[Role.CHANNEL_SCALE].float().reshape(-1, 1)
    correction = _correction(parts, shape_NK)
    codebook = parts.get(Role.CODEBOOK)
    table = pair_table(LEVELS if codebook is None else codebook.float().tolist(), codes)
    weight = empty(shape_NK, dtype=float32, device=codes.device)
    for rows in row_spans(shape_NK):
        steps = unpacked(codes[rows], table, shape_NK[1]) * relative.over(rows, shape_NK[1])
        weight[rows] = steps.round_().clamp_(-LARGEST, LARGEST).mul_(channel[rows])
        if correction is not None:
            weight[rows] += correction.over(rows, shape_NK[1])
    return weight


def _correction(parts: "Mapping[Role, Tensor]", shape_NK: tuple[int, int]) -> Grid | None:
    stored = parts.get(Role.CORRECTION)
    return None if stored is None else group_grid(stored.float(), shape_NK)


CODEC = Codec(
    bits=4,
    scales=(frozenset({Role.BLOCK_SCALE, Role.CHANNEL_SCALE}),),
    optional=frozenset({Role.CODEBOOK, Role.CORRECTION}),
    code_dtypes=frozenset({"I8", "U8"}),
    decode=decode,
)
