"""FP8: one byte per weight, in any granularity of scale.

    codes           (N, K)              float8 or uint8   the option `kind` says which float8
    tensor_scale    ()                  float32           multiplies; amax / largest float8
    channel_scale   (N,)                float32           multiplies
    block_scale     (N/bn, K/bk)        float32           multiplies; or (N, G), groups of K / G

One of the three scales. Options:

    kind    e4m3 (largest 448, default) | e5m2 (57344) | e4m3fnuz (240)
    block   rows x columns of a two-dimensional block, 128x128 by default; last ones may be ragged
    scale   `none`: raw casts that have no scale at all; without it a missing scale is an error

Sources: OCP 8-bit floating point specification; ModelOpt exports (divide in the weights' dtype).
A zero scale decodes to zero: ModelOpt writes NaN codes for an all-zero weight.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.encodings._float8 import wide
from diffquant.encodings._scales import (
    ROLES,
    Cell,
    decode_rows,
    divided_rows,
    grids,
    stored,
    symmetric_grid,
)
from diffquant.errors import PlanError
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "e4m3fnuz": 240.0}


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = codes * scale, one float32 rounding."""
    codes = parts[Role.CODES].reshape(shape_NK).view(code_dtype(encoding))
    scaled = encoding.option("scale", "") != "none"
    scales = grids(parts, shape_NK, block_cell(encoding)) if scaled else ()
    return decode_rows(codes, wide, shape_NK, scales)


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """scale = amax / largest in float32; codes = values / scale, saturated, nearest even.

    Division happens in the values' dtype for a tensor scale, as ModelOpt does.
    """
    from torch import empty_like

    largest = LARGEST[kind(encoding)]
    grid = symmetric_grid(values_NK, recipe, largest, block_cell(encoding).columns)
    codes = empty_like(values_NK, dtype=code_dtype(encoding))
    for rows, ratio in divided_rows(values_NK, grid):
        codes[rows] = ratio.clamp_(-largest, largest).to(codes.dtype)
    return {Role.CODES: codes, **stored(grid, recipe)}


def kind(encoding: Encoding) -> str:
    """Which float8. Raises PlanError for one that is none."""
    name = encoding.option("kind", "e4m3")
    if name not in LARGEST:
        raise PlanError(f"{name!r} is no kind of fp8", hint=f"one of: {', '.join(LARGEST)}")
    return name


def code_dtype(encoding: Encoding) -> "torch.dtype":
    """The torch dtype of the codes."""
    import torch

    return {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e4m3fnuz": torch.float8_e4m3fnuz,
    }[kind(encoding)]


def block_cell(encoding: Encoding) -> Cell:
    """Rows and columns of a two-dimensional block."""
    rows, columns = encoding.option("block", "128x128").split("x")
    return Cell(int(rows), int(columns))


CODEC = Codec(
    bits=8,
    scales=(
        frozenset({Role.TENSOR_SCALE}),
        frozenset({Role.CHANNEL_SCALE}),
        frozenset({Role.BLOCK_SCALE}),
    ),
    waived={"scale=none": frozenset(ROLES.values())},
    code_dtypes=frozenset({"F8_E4M3", "F8_E5M2", "U8"}),
    decode=decode,
    encode=encode,
)
