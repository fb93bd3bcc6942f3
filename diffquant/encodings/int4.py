"""INT4: two integers per byte, scales per group, row or tensor.

    codes           (N, K / 2)   uint8   bits 0-3 hold the even column
    block_scale     (N, G)       float   multiplies; groups of K / G columns
    channel_scale   (N,)         float   multiplies; alone or beside a block scale
    tensor_scale    ()           float   multiplies when alone; beside a block scale see below
    zero_point      (N, G)       float   absent means none; (N,) beside a channel scale
    group_index     (K,)         int     the group of every column; absent means they are in order

Options:

    signed   true (default): two's complement, -8..7 | false: 0..15 | offset: the code less 8
    zero     integer (default): (code - zero) * scale | scaled: code * scale + zero (Nunchaku AWQ)
    group    columns per block scale and zero point, K / G by default; where it is named, groups
             beyond K are padding (Nunchaku AWQ pads to 16 of them)

A tensor scale beside a block scale is ModelOpt's W4A8: the weight code * block_scale is held by the
kernel as e4m3(weight / tensor_scale) * tensor_scale, so that is what it decodes to.
Sources: ModelOpt (INT4_AWQ, W4A8_AWQ), Nunchaku (SVDQuant, AWQ), comfy-kitchen (AWQ, `offset`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from diffquant.encodings import Codec, Recipe
from diffquant.encodings._nibbles import packed, pair_table, unpacked
from diffquant.encodings._scales import (
    Cell,
    decode_rows,
    divided_rows,
    grids,
    offset_grid,
    row_spans,
    stored,
    symmetric_grid,
)
from diffquant.encodings.fp8 import LARGEST as LARGEST_FP8
from diffquant.errors import PlanError
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

SIGNED = (*range(8), *range(-8, 0))
UNSIGNED = tuple(range(16))
TABLES = {"true": SIGNED, "false": UNSIGNED, "offset": tuple(range(-8, 8))}
GROUP = 128
#: Parts of a group's range that are tried where a zero is scaled: outliers may be cut.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = (codes - zero) * scales, or codes * scales + zero; float32."""
    from torch import uint8

    held = _by_column(_trimmed(parts, encoding, shape_NK[1]))
    fp8_scale = held.pop(Role.TENSOR_SCALE, None) if Role.BLOCK_SCALE in held else None
    codes = held[Role.CODES].view(uint8)
    table = pair_table(TABLES[encoding.option("signed", "true")], codes)
    zero = offset_grid(held.get(Role.ZERO_POINT), shape_NK)
    added = encoding.option("zero", "integer") == "scaled"
    weight = decode_rows(
        codes,
        lambda rows: unpacked(rows, table, shape_NK[1]),
        shape_NK,
        grids(held, shape_NK, Cell(1, int(encoding.option("group", str(GROUP))))),
        minus=None if added else zero,
        plus=zero if added else None,
    )
    if fp8_scale is not None:
        _hold_in_fp8(weight, fp8_scale.float().reshape(()))
    return weight


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """scale = amax / 7 (unsigned: / 15) in float32; codes = values / scale, nearest even.

    With `zero=scaled`: scale = r * (max - min) / 15 and zero so that the ends of the range are cut
    alike, both in bfloat16; r is the one of `RANGES` that loses least in each group.
    """
    from torch import uint8

    if encoding.option("zero", "integer") == "scaled":
        return _with_zero(values_NK, encoding, recipe)
    low, high = (0, 15) if recipe.unsigned else (-8, 7)
    grid = symmetric_grid(values_NK, recipe, float(high), GROUP)
    codes = values_NK.new_empty(len(values_NK), -(-values_NK.shape[1] // 2), dtype=uint8)
    for rows, ratio in divided_rows(values_NK, grid):
        whole = ratio.round_().clamp_(low, high).int() & 15
        codes[rows] = packed(whole.to(uint8))
    return {Role.CODES: codes, **stored(grid, recipe)}


def _with_zero(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    from torch import bfloat16, uint8

    n, columns = values_NK.shape
    group = recipe.group or int(encoding.option("group", str(GROUP)))
    if columns % group:
        raise PlanError(f"groups of {group} do not divide {columns} columns")
    codes = values_NK.new_empty(n, columns // 2, dtype=uint8)
    scale = values_NK.new_empty(n, columns // group, dtype=bfloat16)
    zero = scale.new_empty(scale.shape)
    spans = [slice(n)] if values_NK.is_meta else row_spans((n, columns))
    for rows in spans:
        best = _in_best_range(values_NK[rows].float().unflatten(1, (-1, group)))
        codes[rows] = packed(best.codes.flatten(1))
        scale[rows], zero[rows] = best.scale[..., 0], best.zero[..., 0]
    return {Role.CODES: codes, Role.BLOCK_SCALE: scale, Role.ZERO_POINT: zero}


class _InRange(NamedTuple):
    """Groups [N, G, …] in one range: scale, zero and squared error have a last axis of 1."""

    codes: "Tensor"
    scale: "Tensor"
    zero: "Tensor"
    lost: "Tensor"


def _in_best_range(grouped: "Tensor") -> _InRange:
    from torch import where

    best = _in_range(grouped, RANGES[0])
    for part in RANGES[1:]:
        other = _in_range(grouped, part)
        less = other.lost < best.lost
        best = _InRange(*(where(less, one, two) for one, two in zip(other, best, strict=True)))
    return best


def _in_range(grouped: "Tensor", part: float) -> _InRange:
    """Codes of every group over the middle `part` of its range."""
    from torch import bfloat16, uint8

    # aminmax along a dimension takes ten times as long as both
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    middle, reach = (low + high) / 2, (high - low) * (part / 2)
    zero, scale = (middle - reach).to(bfloat16), (reach * 2 / 15).to(bfloat16)
    ratio = (grouped - zero.float()) / scale.float()
    codes = ratio.nan_to_num_(nan=0.0).round_().clamp_(0, 15)
    lost = (codes * scale.float() + zero.float()).sub_(grouped).square_().sum(2, keepdim=True)
    return _InRange(codes.to(uint8), scale, zero, lost)


def _trimmed(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, columns: int
) -> "dict[Role, Tensor]":
    """The parts without groups beyond K, where the encoding names the group."""
    group = int(encoding.option("group", "0"))
    trimmed = dict(parts)
    for role in (Role.BLOCK_SCALE, Role.ZERO_POINT):
        if group and role in parts and parts[role].ndim == 2:
            trimmed[role] = parts[role][:, : -(-columns // group)]
    return trimmed


def _by_column(parts: "dict[Role, Tensor]") -> "dict[Role, Tensor]":
    """Scales and zero points of every column, where columns name their group."""
    index = parts.pop(Role.GROUP_INDEX, None)
    if index is None:
        return parts
    grouped = {Role.BLOCK_SCALE, Role.ZERO_POINT} & parts.keys()
    return parts | {role: parts[role][:, index.long()] for role in grouped}


def _hold_in_fp8(weight: "Tensor", scale: "Tensor") -> None:
    """weight = e4m3(weight / scale) * scale, in place."""
    from torch import float8_e4m3fn

    largest = LARGEST_FP8["e4m3"]
    for rows in row_spans((weight.shape[0], weight.shape[1])):
        ratio = (weight[rows] / scale).clamp_(-largest, largest)
        weight[rows] = ratio.to(float8_e4m3fn).float().mul_(scale)


CODEC = Codec(
    bits=4,
    scales=(
        frozenset({Role.BLOCK_SCALE}),
        frozenset({Role.CHANNEL_SCALE}),
        frozenset({Role.TENSOR_SCALE}),
    ),
    optional=frozenset({Role.ZERO_POINT, Role.GROUP_INDEX}),
    code_dtypes=frozenset({"U8", "I8", "I16", "I32"}),
    decode=decode,
    encode=encode,
)
