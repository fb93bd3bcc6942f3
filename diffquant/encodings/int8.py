"""INT8: one signed byte per weight, in any granularity of scale.

    codes           (N, K)         int8      two's complement
    tensor_scale    ()             float32   multiplies; amax / 127
    channel_scale   (N,)           float32   multiplies
    block_scale     (N/bn, K/bk)   float32   multiplies; or (N, G), groups of K / G
    zero_point      like the scale number    subtracted from the code first; absent means 0

One of the three scales. Option `block` (rows x columns, 128x128 by default) is the size of a
two-dimensional block. Sources: ModelOpt (int8 weight-only, SmoothQuant), msModelSlim (offset).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.encodings._scales import (
    decode_rows,
    divided_rows,
    grids,
    offset_grid,
    stored,
    symmetric_grid,
)
from diffquant.encodings.fp8 import block_cell
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 127.0


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = (codes - zero_point) * scale, one float32 rounding."""
    from torch import int8

    codes = parts[Role.CODES].reshape(shape_NK).view(int8)
    return decode_rows(
        codes,
        lambda rows: rows,
        shape_NK,
        grids(parts, shape_NK, block_cell(encoding)),
        minus=offset_grid(parts.get(Role.ZERO_POINT), shape_NK),
    )


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """scale = amax / 127 in float32; codes = values / scale, nearest even, symmetric."""
    from torch import empty_like, int8

    grid = symmetric_grid(values_NK, recipe, LARGEST, block_cell(encoding).columns)
    codes = empty_like(values_NK, dtype=int8)
    for rows, ratio in divided_rows(values_NK, grid):
        codes[rows] = ratio.round_().clamp_(-128, 127).to(int8)
    return {Role.CODES: codes, **stored(grid, recipe)}


CODEC = Codec(
    bits=8,
    scales=(
        frozenset({Role.TENSOR_SCALE}),
        frozenset({Role.CHANNEL_SCALE}),
        frozenset({Role.BLOCK_SCALE}),
    ),
    optional=frozenset({Role.ZERO_POINT}),
    code_dtypes=frozenset({"I8"}),
    decode=decode,
    encode=encode,
)
