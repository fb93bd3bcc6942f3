"""NVFP4: E2M1 in groups of 16 along K, an e4m3 scale per group, an outer scale above them.

    codes           (N, K / 2)   uint8     two E2M1; bits 0-3 hold the even column
    block_scale     (N, K / 16)  e4m3      multiplies; row-major here, tiles are a layout
    tensor_scale    ()           float32   multiplies; amax / (6 * 448)
    channel_scale   (N,)         float     multiplies; Nunchaku's fused layers have one per row

The outer scale is a tensor scale, a channel scale, or both. Options:

    block          columns per group: 16, or 32 in ModelOpt's W4A8_NVFP4_FP8
    tensor_scale   multiply (default) | divide: compressed-tensors and LightX2V store the inverse
    outer          `none`: no outer scale at all (Nunchaku), the block scale alone is the scale

Sources: ModelOpt 0.47 exports (bit-equal); Nunchaku's rule for `outer=none`, where the block scale
is min(amax / 6, 448) rounded to e4m3 and the codes come from the unrounded one.

Tools that agree on all this still round in another order, which moves some thousandths of the codes by
one: `ARITHMETIC` has the order of each, compared byte for byte (`python -m benchmarks convert`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.encodings import _e2m1 as e2m1
from diffquant.encodings._nibbles import packed, pair_table, unpacked
from diffquant.encodings._scales import (
    Cell,
    Grid,
    amax,
    as_e4m3,
    channel_grid,
    decode_rows,
    divided_rows,
    group_grid,
    row_spans,
    tensor_grid,
)
from diffquant.errors import PlanError
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SCALE = 448.0
SMALLEST_SCALE = 2.0**-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """One tool's way from numbers to codes under an outer scale.

    in_steps   block scale (amax / 6) / outer, instead of amax / (6 outer)
    inverted   codes from value * ((1 / outer) / block), instead of value / (block outer)
    smallest   no block scale is below it
    empty      block scale of zeros; anything would do, because their codes are zero
    """

    in_steps: bool = True
    inverted: bool = False
    smallest: float
    empty: float


ARITHMETIC: Mapping[str, Arithmetic] = {
    "modelopt": Arithmetic(in_steps=False, smallest=SMALLEST_SCALE, empty=1.0),
    "comfy": Arithmetic(smallest=0.0, empty=0.0),
    "torchao": Arithmetic(inverted=True, smallest=2.0**-6, empty=0.0),
}


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = e2m1(codes) * block_scale * outer scales; the first product is exact."""
    table = pair_table(e2m1.VALUES, parts[Role.CODES])
    return decode_rows(
        parts[Role.CODES],
        lambda rows: unpacked(rows, table, shape_NK[1]),
        shape_NK,
        tuple(_scales(parts, encoding, shape_NK)),
    )


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """Nearest E2M1, ties to even; block scales rounded to e4m3 and never below 2^-9.

    A given `recipe.scale` is the outer scale, as the encoding stores it: of the tensor, or of every
    row.
    """
    cell = Cell(1, group_of(encoding))
    if encoding.option("outer", "") == "none":
        return _without_outer(values_NK, cell)
    divides = encoding.option("tensor_scale", "multiply") == "divide"
    most = amax(values_NK, cell)
    outer = _outer(most, (len(values_NK), values_NK.shape[1]), recipe, divides)
    arithmetic = ARITHMETIC[recipe.arithmetic]
    block = _block_scale(most.float(), outer, arithmetic)
    scales = Grid(block.float(), cell), outer
    codes = (_inverted_codes if arithmetic.inverted else _codes)(values_NK, *scales)
    role = Role.TENSOR_SCALE if outer.values.ndim == 0 else Role.CHANNEL_SCALE
    told = outer.values.squeeze()
    return {Role.CODES: codes, Role.BLOCK_SCALE: block, role: 1 / told if divides else told}


def group_of(encoding: Encoding) -> int:
    """Columns per block scale."""
    return int(encoding.option("block", "16"))


def _scales(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> list[Grid]:
    block = as_e4m3(parts[Role.BLOCK_SCALE]).float()
    tensor = parts.get(Role.TENSOR_SCALE)
    if tensor is not None and encoding.option("tensor_scale", "multiply") == "divide":
        block, tensor = block / tensor.float().reshape(()), None
    scales = [group_grid(block, shape_NK, group_of(encoding))]
    if (channel := parts.get(Role.CHANNEL_SCALE)) is not None:
        scales.append(channel_grid(channel, shape_NK))
    if tensor is not None:
        scales.append(tensor_grid(tensor, shape_NK))
    if not (CODEC.is_complete(encoding, frozenset(parts))):
        raise PlanError(
            f"{encoding} has no outer scale",
            hint="a file that has none says so with the option outer=none",
        )
    return scales


def _outer(most: "Tensor", shape_NK: tuple[int, int], recipe: Recipe, divides: bool) -> Grid:
    """The scale that multiplies, of the tensor or of every row; `most` is the blocks' amax."""
    if recipe.scale is None:
        scale = most.amax().float() / (e2m1.LARGEST * LARGEST_SCALE)
        return tensor_grid(scale, shape_NK)
    given = 1 / recipe.scale.float() if divides else recipe.scale.float()
    return tensor_grid(given, shape_NK) if given.numel() == 1 else channel_grid(given, shape_NK)


def _block_scale(most: "Tensor", outer: Grid, arithmetic: Arithmetic) -> "Tensor":
    from torch import float8_e4m3fn

    if arithmetic.in_steps:
        scale = most / e2m1.LARGEST / outer.values
    else:
        scale = most / (e2m1.LARGEST * outer.values)
    scale = scale.masked_fill_(most == 0, arithmetic.empty)
    return scale.clamp_(arithmetic.smallest, LARGEST_SCALE).to(float8_e4m3fn)


def _without_outer(values_NK: "Tensor", cell: Cell) -> "dict[Role, Tensor]":
    from torch import float8_e4m3fn

    exact = (amax(values_NK, cell).float() / e2m1.LARGEST).clamp_(max=LARGEST_SCALE)
    codes = _codes(values_NK, Grid(exact, cell))
    return {Role.CODES: codes, Role.BLOCK_SCALE: exact.to(float8_e4m3fn)}


def _codes(values_NK: "Tensor", *scales: Grid) -> "Tensor":
    return _packed(values_NK, divided_rows(values_NK, *scales))


def _inverted_codes(values_NK: "Tensor", block: Grid, outer: Grid) -> "Tensor":
    inverse = Grid(1 / outer.values / block.values, block.cell)
    spans = row_spans((len(values_NK), values_NK.shape[1]))
    rows = ((span, inverse.over(span, values_NK.shape[1])) for span in spans)
    return _packed(values_NK, ((span, values_NK[span].float() * over) for span, over in rows))


def _packed(values_NK: "Tensor", ratios: "Iterator[tuple[slice, Tensor]]") -> "Tensor":
    from torch import uint8

    codes = values_NK.new_empty(len(values_NK), -(-values_NK.shape[1] // 2), dtype=uint8)
    for rows, ratio in ratios:
        codes[rows] = packed(e2m1.codes(ratio))
    return codes


CODEC = Codec(
    bits=4,
    scales=(
        frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE}),
        frozenset({Role.BLOCK_SCALE, Role.CHANNEL_SCALE}),
        frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
    ),
    waived={"outer=none": frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE})},
    code_dtypes=frozenset({"U8", "I8"}),
    group=16,
    decode=decode,
    encode=encode,
)
