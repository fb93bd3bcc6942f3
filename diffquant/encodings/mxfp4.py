"""MXFP4: E2M1 in groups of 32 along K that share a power of two, maybe in outer groups of 512.

    codes         (N, K / 2)         uint8                    two E2M1; bits 0-3 hold the even column
    block_scale   (N, K / 32)        uint8 or float8_e8m0fnu  multiplies; 2^(b - 127), 255 is NaN
    outer_scale   (N, ceil(K/512))   float32                  multiplies; msModelSlim's dual scale

Encoding makes the dual scale for a recipe with groups of 512; the option `exponent` (ceil, floor)
is explained in `_e8m0.scales`. Sources: OCP microscaling specification 1.0; ModelOpt; the Ascend
operator DynamicDualLevelMxQuant, whose first level is amax / 6 per 512 and whose second is floor.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.encodings import _e2m1 as e2m1
from diffquant.encodings import _e8m0 as e8m0
from diffquant.encodings._nibbles import packed, pair_table, unpacked
from diffquant.encodings._scales import (
    Cell,
    Grid,
    amax,
    decode_rows,
    divided_rows,
    group_grid,
)
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 32
OUTER_GROUP = 512


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = e2m1(codes) * 2^(block_scale - 127) * outer_scale; only the last one can round."""
    table = pair_table(e2m1.VALUES, parts[Role.CODES])
    scales = [group_grid(e8m0.values(parts[Role.BLOCK_SCALE]), shape_NK, GROUP)]
    if (outer := parts.get(Role.OUTER_SCALE)) is not None:
        scales.append(group_grid(outer.reshape(shape_NK[0], -1), shape_NK, OUTER_GROUP))
    return decode_rows(
        parts[Role.CODES],
        lambda rows: unpacked(rows, table, shape_NK[1]),
        shape_NK,
        tuple(scales),
    )


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """Nearest E2M1, ties to even, of the values over their scales."""
    from torch import empty_like

    if recipe.group != OUTER_GROUP:
        return _single_level(values_NK, encoding)
    outer = Grid(amax(values_NK, Cell(1, OUTER_GROUP)).float() / e2m1.LARGEST, Cell(1, OUTER_GROUP))
    inner = empty_like(values_NK)
    for rows, ratio in divided_rows(values_NK, outer):
        inner[rows] = ratio.to(inner.dtype)
    dual = Encoding("mxfp4", (("exponent", "floor"),))
    return {**_single_level(inner, dual), Role.OUTER_SCALE: outer.values}


def _single_level(values_NK: "Tensor", encoding: Encoding) -> "dict[Role, Tensor]":
    from torch import uint8

    scale = e8m0.scales(amax(values_NK, Cell(1, GROUP)), e2m1.LARGEST, encoding)
    codes = values_NK.new_empty(len(values_NK), -(-values_NK.shape[1] // 2), dtype=uint8)
    for rows, ratio in divided_rows(values_NK, Grid(e8m0.values(scale), Cell(1, GROUP))):
        codes[rows] = packed(e2m1.codes(ratio))
    return {Role.CODES: codes, Role.BLOCK_SCALE: scale}


CODEC = Codec(
    bits=4,
    scales=(frozenset({Role.BLOCK_SCALE}),),
    optional=frozenset({Role.OUTER_SCALE}),
    code_dtypes=frozenset({"U8", "I8"}),
    group=GROUP,
    decode=decode,
    encode=encode,
)
