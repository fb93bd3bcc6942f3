"""x [M, K] times an encoded weight [N, K]: each tile is decoded where it is multiplied.

M rows, N output columns, K input columns, G groups along K. Codes stay as they lie in memory,
[N, K] row-major, two 4-bit codes per byte with the even column in the low bits. `SPAN` columns in a
row share a scale for certain: the largest power of two that divides the group and fits the tile.
"""

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.kernels._triton.tiles import NEIGHBOURS, Tile, place, programs

#: Most rows of x -> the tile; the last is for any number.
TILES = (
    (16, Tile(rows=16, columns=64, depth=128, warps=4, stages=3)),
    (64, Tile(rows=64, columns=64, depth=64, warps=4, stages=3)),
    (512, Tile(rows=64, columns=128, depth=64, warps=4, stages=3)),
)
LARGE = Tile(rows=128, columns=128, depth=64, warps=8, stages=3)
#: A group no weight is wider than: one scale per row.
WHOLE_ROW = 1 << 30
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """How bytes become numbers.

    code, scale  device functions of `numbers`; no scale function: there are none per group
    packed       two codes per byte
    zero         "none", "subtracted" from codes before scaling, or "added" to scaled ones
    """

    code: Any
    scale: Any = None
    packed: bool = True
    zero: str = "none"


def multiply(
    x_MK: Tensor,
    codes: Tensor,
    n: int,
    numbers: Numbers,
    *,
    scale_NG: Tensor | None = None,
    group: int = WHOLE_ROW,
    zero_NG: Tensor | None = None,
    outer: Tensor | None = None,
) -> Tensor:
    """y [M, N] = x · Wᵀ in the dtype of x, summed in float32.

    scale_NG, zero_NG  one per `group` columns; a zero of one column is that of the whole row
    outer              float32 () or [N], multiplies the sums
    """
    m, k = x_MK.shape
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    y_MN = x_MK.new_empty(m, n)
    tile = tile_of(m)
    zero_group = WHOLE_ROW if zero_NG is None or zero_NG.shape[1] == 1 else group
    with torch.cuda.device_of(x_MK):
        _multiply[programs(m, n, tile)](
            x_MK,
            codes,
            scale_NG,
            zero_NG,
            outer,
            y_MN,
            m,
            n,
            k,
            x_MK.stride(0),
            codes.stride(0),
            0 if scale_NG is None else scale_NG.stride(0),
            0 if zero_NG is None else zero_NG.stride(0),
            0 if outer is None or outer.ndim == 0 else 1,
            CODE=numbers.code,
            SCALE=numbers.scale,
            PACKED=numbers.packed,
            ZERO=numbers.zero,
            GROUP=group,
            ZERO_GROUP=zero_group,
            SPAN=gcd(group, zero_group, tile.depth),
            DTYPE=TYPES[x_MK.dtype],
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            NEIGHBOURS=NEIGHBOURS,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y_MN


def tile_of(rows: int) -> Tile:
    """The tile for so many rows of x."""
    return next((tile for most, tile in TILES if rows <= most), LARGE)


@triton.jit
def _multiply(
    x,
    codes,
    scale,
    zero,
    outer,
    y,
    M,
    N,
    K,
    x_row,
    codes_row,
    scale_row,
    zero_row,
    outer_step,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    PACKED: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO_GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    SPANS: tl.constexpr = BLOCK_K // SPAN
    down, across = place(M, N, BLOCK_M, BLOCK_N, NEIGHBOURS)
    rows_M = down * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_N = across * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    firsts = tl.arange(0, SPANS) * SPAN
    own_M, own_N = (rows_M < M)[:, None], (rows_N < N)[:, None]
    # Products of row numbers and widths pass 2^31 in long videos.
    from_x = x + rows_M.to(tl.int64)[:, None] * x_row
    from_codes = codes + rows_N.to(tl.int64)[:, None] * codes_row
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        at = k + columns[None, :]
        x_tile = tl.load(from_x + at, mask=own_M & (at < K), other=0.0)
        if PACKED:
            at = k // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            byte = tl.load(from_codes + at, mask=own_N & (at < (K + 1) // 2), other=0)
            code = tl.interleave(byte & 15, byte >> 4)
        else:
            code = tl.load(from_codes + at, mask=own_N & (at < K), other=0)
        value = tl.reshape(CODE(code), (BLOCK_N, SPANS, SPAN))
        first = k + firsts[None, :]
        if ZERO != "none":
            from_zero = zero + rows_N[:, None] * zero_row + first // ZERO_GROUP
            lifted = tl.load(from_zero, mask=own_N & (first < K), other=0).to(tl.float32)
        if ZERO == "subtracted":
            value -= lifted[:, :, None]
        if SCALE is not None:
            from_scale = scale + rows_N[:, None] * scale_row + first // GROUP
            steps = SCALE(tl.load(from_scale, mask=own_N & (first < K), other=0))
            value *= steps[:, :, None]
        if ZERO == "added":
            value += lifted[:, :, None]
        weight = tl.reshape(value, (BLOCK_N, BLOCK_K)).to(DTYPE)
        total = tl.dot(x_tile, tl.trans(weight), total, input_precision="ieee")
    if outer is not None:
        total *= tl.load(outer + rows_N * outer_step, mask=rows_N < N, other=0.0)[None, :]
    to_y = y + rows_M.to(tl.int64)[:, None] * N + rows_N[None, :]
    tl.store(to_y, total.to(DTYPE), mask=own_M & (rows_N < N)[None, :])
