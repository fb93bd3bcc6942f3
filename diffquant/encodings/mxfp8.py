"""MXFP8: float8 in groups of 32 along K that share a power of two.

    codes         (N, K)       float8 or uint8          e4m3; e5m2 with `kind=e5m2`
    block_scale   (N, K / 32)  uint8 or float8_e8m0fnu  multiplies; 2^(b - 127), 255 is NaN

Row-major here; files with 128 x 4 tiles are a layout. Option `exponent` (ceil, floor) concerns
encoding only, see `_e8m0.scales`. Sources: OCP microscaling specification 1.0; ModelOpt exports.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.encodings import _e8m0 as e8m0
from diffquant.encodings._float8 import wide
from diffquant.encodings._scales import Cell, Grid, amax, decode_rows, divided_rows, group_grid
from diffquant.encodings.fp8 import LARGEST, code_dtype, kind
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = codes * 2^(block_scale - 127), exact in float32."""
    codes = parts[Role.CODES].reshape(shape_NK).view(code_dtype(encoding))
    scale = e8m0.values(parts[Role.BLOCK_SCALE])
    return decode_rows(codes, wide, shape_NK, (group_grid(scale, shape_NK, GROUP),))


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """The smallest power of two that keeps each group's largest value representable."""
    from torch import empty_like

    largest = LARGEST[kind(encoding)]
    scale = e8m0.scales(amax(values_NK, Cell(1, GROUP)), largest, encoding)
    codes = empty_like(values_NK, dtype=code_dtype(encoding))
    for rows, ratio in divided_rows(values_NK, Grid(e8m0.values(scale), Cell(1, GROUP))):
        codes[rows] = ratio.clamp_(-largest, largest).to(codes.dtype)
    return {Role.CODES: codes, Role.BLOCK_SCALE: scale}


CODEC = Codec(
    bits=8,
    scales=(frozenset({Role.BLOCK_SCALE}),),
    code_dtypes=frozenset({"F8_E4M3", "F8_E5M2", "U8"}),
    group=GROUP,
    decode=decode,
    encode=encode,
)
