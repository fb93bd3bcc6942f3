"""int4 times int4 in groups, through int8 tensor cores: exact integer sums of a group, scaled in
float32, and a low-rank branch added before the one rounding.

M rows, N output columns, K input columns, G groups along K, R rank. Tensor cores for int4 end with
Ada; int8 ones are there from Ampere to Hopper and give the same integers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.errors import KernelError
from diffquant.kernels._triton.tiles import NEIGHBOURS, Tile, place, programs

TILES = (
    (64, Tile(rows=64, columns=64, depth=64, warps=4, stages=4)),
    (512, Tile(rows=64, columns=128, depth=64, warps=4, stages=4)),
)
LARGE = Tile(rows=128, columns=128, depth=64, warps=8, stages=4)
#: Columns of the low-rank branch at a time.
RANKS = 32
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def multiply(
    codes_MK: Tensor,
    scale_GM: Tensor,
    codes: Tensor,
    scale_NG: Tensor,
    dtype: torch.dtype,
    low_MR: Tensor | None = None,
    up_NR: Tensor | None = None,
) -> Tensor:
    """y [M, N] = Σ_g scale_GM[g] scale_NG[:, g] (codes_g · codes_gᵀ) + low · upᵀ, rounded to `dtype`.

    codes_MK  int8; codes: [N, K / 2] two's complement, the even column in the low bits
    scale_NG  may have more groups than the input, which are padding
    low, up   in `dtype`

    Raises KernelError where scales are fewer than groups.
    """
    m, k = codes_MK.shape
    n, groups = scale_NG.shape[0], scale_GM.shape[0]
    if scale_NG.shape[1] < groups:
        raise KernelError(f"{groups} groups of the input meet {scale_NG.shape[1]} of the weight")
    codes, scale_NG = codes.contiguous(), scale_NG.contiguous()
    low_MR, up_NR = (None if each is None else each.contiguous() for each in (low_MR, up_NR))
    y_MN = codes_MK.new_empty(m, n, dtype=dtype)
    tile = next((tile for most, tile in TILES if m <= most), LARGE)
    with torch.cuda.device_of(codes_MK):
        _multiply[programs(m, n, tile)](
            codes_MK,
            scale_GM,
            codes,
            scale_NG,
            low_MR,
            up_NR,
            y_MN,
            m,
            n,
            k,
            groups,
            scale_NG.stride(0),
            0 if low_MR is None else low_MR.shape[1],
            GROUP=k // groups,
            DTYPE=TYPES[dtype],
            RANKS=RANKS,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            NEIGHBOURS=NEIGHBOURS,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y_MN


@triton.jit
def _multiply(
    x,
    x_scale,
    codes,
    scale,
    low,
    up,
    y,
    M,
    N,
    K,
    groups,
    scale_row,
    rank,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    HALF: tl.constexpr = GROUP // 2
    down, across = place(M, N, BLOCK_M, BLOCK_N, NEIGHBOURS)
    rows_M = down * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_N = across * BLOCK_N + tl.arange(0, BLOCK_N)
    own_M, own_N = rows_M < M, rows_N < N
    from_x = x + rows_M.to(tl.int64)[:, None] * K + tl.arange(0, GROUP)[None, :]
    from_codes = codes + rows_N.to(tl.int64)[:, None] * (K // 2) + tl.arange(0, HALF)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, groups):
        x_tile = tl.load(from_x + group * GROUP, mask=own_M[:, None], other=0)
        byte = tl.load(from_codes + group * HALF, mask=own_N[:, None], other=0)
        code = tl.interleave(byte & 15, byte >> 4)
        weight = (code ^ 8).to(tl.int8) - 8
        whole = tl.dot(x_tile, tl.trans(weight), out_dtype=tl.int32)
        step_M = tl.load(x_scale + group * M + rows_M, mask=own_M, other=0.0)
        step_N = tl.load(scale + rows_N * scale_row + group, mask=own_N, other=0.0)
        total += whole.to(tl.float32) * step_M[:, None] * step_N.to(tl.float32)[None, :]
    if low is not None:
        ranks = tl.arange(0, RANKS)[None, :]
        from_low = low + rows_M.to(tl.int64)[:, None] * rank
        from_up = up + rows_N[:, None] * rank
        for first in range(0, rank, RANKS):
            at = first + ranks
            low_tile = tl.load(from_low + at, mask=own_M[:, None] & (at < rank), other=0.0)
            up_tile = tl.load(from_up + at, mask=own_N[:, None] & (at < rank), other=0.0)
            total = tl.dot(low_tile, tl.trans(up_tile), total, input_precision="ieee")
    to_y = y + rows_M.to(tl.int64)[:, None] * N + rows_N[None, :]
    tl.store(to_y, total.to(DTYPE), mask=own_M[:, None] & own_N[None, :])
