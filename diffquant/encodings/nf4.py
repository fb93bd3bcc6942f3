"""NF4: four bits that name one of sixteen levels, times the largest magnitude of their block.

    codes           (N, K / 2)   uint8            indices 0..15; bits 0-3 hold the even column
    block_scale     (N, K / 64)  float32 | uint8  multiplies: the block's largest magnitude
    codebook        (16,)        float32          the levels, largest 1; absent: those of `kind`

Where the block scale is uint8 it names a value of a map, and all of these are there:

    nested_map      (256,)       float32          values
    nested_scale    (N, K / 64)  float32          multiplies the value: one per 256 blocks in the file
    nested_offset   ()           float32          added after that

Options:

    block   columns per block scale, 64 by default
    kind    nf4 (default): quantiles of the normal distribution | fp4: bitsandbytes' e2m1, / 12

Source: bitsandbytes 0.50, bit-equal; QLoRA (arXiv:2305.14314) for the levels.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import Codec, Recipe
from diffquant.encodings._nibbles import packed, pair_table, unpacked
from diffquant.encodings._scales import (
    decode_rows,
    divided_rows,
    group_grid,
    stored,
    symmetric_grid,
)
from diffquant.errors import PlanError
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 64
EVERY = slice(None)
NESTED = (Role.NESTED_MAP, Role.NESTED_SCALE, Role.NESTED_OFFSET)
# fmt: off
LEVELS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}
# fmt: on


def decode(
    parts: "Mapping[Role, Tensor]", encoding: Encoding, shape_NK: tuple[int, int]
) -> "Tensor":
    """weight_NK = level * block_scale, one float32 rounding."""
    from torch import uint8

    codes = parts[Role.CODES].view(uint8)
    table = pair_table(levels(parts, encoding), codes)
    scale = group_grid(magnitudes(parts), shape_NK, int(encoding.option("block", str(GROUP))))
    return decode_rows(codes, lambda rows: unpacked(rows, table, shape_NK[1]), shape_NK, (scale,))


def levels(parts: "Mapping[Role, Tensor]", encoding: Encoding) -> tuple[float, ...]:
    """What the sixteen codes mean."""
    codebook = parts.get(Role.CODEBOOK)
    kind = encoding.option("kind", "nf4")
    return LEVELS[kind] if codebook is None else tuple(codebook.float().reshape(-1).tolist())


def magnitudes(parts: "Mapping[Role, Tensor]", rows: slice = EVERY) -> "Tensor":
    """Float32 block scales of these rows [n, G]. Raises PlanError when coded ones lack what decodes
    them."""
    from torch import uint8

    scale = parts[Role.BLOCK_SCALE][rows]
    if scale.dtype != uint8:
        return scale.float()
    if missing := [role for role in NESTED if role not in parts]:
        raise PlanError(f"block scales are coded, and there is no {', '.join(missing)}")
    values, outer, offset = (parts[role].float() for role in NESTED)
    return values[scale.int()] * outer[rows] + offset


def encode(values_NK: "Tensor", encoding: Encoding, recipe: Recipe) -> "dict[Role, Tensor]":
    """scale = the block's largest magnitude in float32; codes = the nearest level of values / scale."""
    import torch

    grid = symmetric_grid(values_NK, recipe, 1.0, GROUP)
    ordered, order = torch.tensor(LEVELS[encoding.option("kind", "nf4")]).sort(stable=True)
    order = order.to(values_NK.device, torch.uint8)
    middles = ((ordered[1:] + ordered[:-1]) / 2).to(values_NK.device)
    codes = values_NK.new_empty(len(values_NK), -(-values_NK.shape[1] // 2), dtype=torch.uint8)
    for rows, ratio in divided_rows(values_NK, grid):
        codes[rows] = packed(order[torch.bucketize(ratio.float(), middles)])
    return {Role.CODES: codes, **stored(grid, recipe)}


CODEC = Codec(
    bits=4,
    scales=(frozenset({Role.BLOCK_SCALE}),),
    optional=frozenset({Role.CODEBOOK, *NESTED}),
    group=GROUP,
    code_dtypes=frozenset({"U8"}),
    decode=decode,
    encode=encode,
)
