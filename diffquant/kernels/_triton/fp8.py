"""e4m3 times e4m3: input codes [M, K] with a scale per token, weight codes [N, K]; Ada and later.

Sums are float32 to the end: Hopper's tensor cores keep 14 bits of a sum, so partial sums of `EXACT`
columns are added outside of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.kernels._triton.tiles import NEIGHBOURS, Tile, place, programs

TILES = (
    (64, Tile(rows=64, columns=64, depth=128, warps=4, stages=3)),
    (512, Tile(rows=64, columns=128, depth=128, warps=4, stages=3)),
)
LARGE = Tile(rows=128, columns=128, depth=64, warps=8, stages=4)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def multiply(
    codes_MK: Tensor, scale_M: Tensor, codes_NK: Tensor, outer: Tensor, dtype: torch.dtype
) -> Tensor:
    """y [M, N] = (codes · codesᵀ) * scale * outer, rounded once to `dtype`.

    outer  float32 () or [N], the weight's scale
    """
    m, k = codes_MK.shape
    n = codes_NK.shape[0]
    y_MN = codes_MK.new_empty(m, n, dtype=dtype)
    tile = next((tile for most, tile in TILES if m <= most), LARGE)
    with torch.cuda.device_of(codes_MK):
        _multiply[programs(m, n, tile)](
            codes_MK,
            scale_M,
            codes_NK,
            outer,
            y_MN,
            m,
            n,
            k,
            outer.ndim,
            DTYPE=TYPES[dtype],
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            NEIGHBOURS=NEIGHBOURS,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y_MN


@triton.jit
def _multiply(
    x,
    scale,
    codes,
    outer,
    y,
    M,
    N,
    K,
    outer_step,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    down, across = place(M, N, BLOCK_M, BLOCK_N, NEIGHBOURS)
    rows_M = down * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_N = across * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)[None, :]
    own_M, own_N = (rows_M < M)[:, None], (rows_N < N)[:, None]
    from_x = x + rows_M.to(tl.int64)[:, None] * K
    from_codes = codes + rows_N.to(tl.int64)[:, None] * K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        at = k + columns
        x_tile = tl.load(from_x + at, mask=own_M & (at < K), other=0.0)
        weight = tl.load(from_codes + at, mask=own_N & (at < K), other=0.0)
        total = tl.dot(x_tile, tl.trans(weight), total, max_num_imprecise_acc=BLOCK_K)
    total *= tl.load(scale + rows_M, mask=rows_M < M, other=0.0)[:, None]
    total *= tl.load(outer + rows_N * outer_step, mask=rows_N < N, other=0.0)[None, :]
    to_y = y + rows_M.to(tl.int64)[:, None] * N + rows_N[None, :]
    tl.store(to_y, total.to(DTYPE), mask=own_M & (rows_N < N)[None, :])
