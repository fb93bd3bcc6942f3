"""Quantizes the input of a linear in one pass over it: e4m3 per token or tensor, int4 per group.

Operations are those of `activations.py` in their order, each rounded by itself, because halfway
cases are common among 16-bit numbers: sums are not fused with products here (`enable_fp_fusion`).
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.kernels._triton.numbers import as_bfloat16, as_e4m3, rounded
from diffquant.plan import Role

if TYPE_CHECKING:
    from diffquant.kernels import Parts

#: The largest finite e4m3 value.
MAX = 448.0
#: Rows of one group a program reads at a time, columns of one token.
ROWS, COLUMNS = 32, 2048


def as_fp8(x_MK: Tensor, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [M, K] and the float32 scale [M] of each token, with which x is codes * scale.

    amax  () of the whole tensor; None: each token's own
    """
    m, k = x_MK.shape
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    codes_MK = x_MK.new_empty(m, k, dtype=torch.float8_e4m3fn)
    scale_M = x_MK.new_empty(m, dtype=torch.float32)
    with torch.cuda.device_of(x_MK):
        _tokens[(m,)](
            x_MK,
            amax,
            codes_MK,
            scale_M,
            k,
            x_MK.stride(0),
            BLOCK=min(COLUMNS, triton.next_power_of_2(k)),
            enable_fp_fusion=False,
        )
    return codes_MK, scale_M


def as_int4(x_MK: Tensor, group: int, *, unsigned: bool) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] of -8..7 or 0..15, and float32 scales [G, M] that are 16-bit numbers."""
    m, k = x_MK.shape
    x_MK = x_MK if x_MK.stride(1) == 1 else x_MK.contiguous()
    codes_MK = x_MK.new_empty(m, k, dtype=torch.int8)
    scale_GM = x_MK.new_empty(k // group, m, dtype=torch.float32)
    with torch.cuda.device_of(x_MK):
        _groups[(triton.cdiv(m, ROWS), k // group)](
            x_MK,
            codes_MK,
            scale_GM,
            m,
            k,
            x_MK.stride(0),
            GROUP=group,
            UNSIGNED=unsigned,
            HALF=x_MK.dtype == torch.float16,
            ROWS=ROWS,
            enable_fp_fusion=False,
        )
    return codes_MK, scale_GM


def amax_of(x_MK: Tensor, parts: "Parts") -> Tensor:
    """() float32: the largest magnitude the file's own scale stands for, or the input's."""
    if Role.INPUT_SCALE in parts:
        return parts[Role.INPUT_SCALE].float().reshape(()) * MAX
    low, high = x_MK.aminmax()
    return torch.maximum(-low, high).float()


@triton.jit
def _tokens(x, amax, codes, scale, K, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    if amax is None:
        each = tl.zeros((BLOCK,), dtype=tl.float32)
        for k in range(0, K, BLOCK):
            at = k + columns
            values = tl.load(x + row * x_row + at, mask=at < K, other=0.0).to(tl.float32)
            each = tl.maximum(each, tl.abs(values), propagate_nan=tl.PropagateNan.ALL)
        most = tl.max(each, 0)
        # A row with NaN stays one: the maximum of a reduction may drop it.
        most += tl.sum(tl.where(each == each, 0.0, each), 0)
    else:
        most = tl.load(amax)
    step = tl.div_rn(1.0, tl.where(most == 0, 448.0, most)) * 448.0
    tl.store(scale + row, tl.where(most == 0, 0.0, tl.div_rn(1.0, step)))
    for k in range(0, K, BLOCK):
        at = k + columns
        values = tl.load(x + row * x_row + at, mask=at < K, other=0.0).to(tl.float32)
        code = tl.clamp(values * step, -448.0, 448.0)
        tl.store(codes + row * K + at, as_e4m3(code).to(tl.float8e4nv), mask=at < K)


@triton.jit
def _groups(
    x,
    codes,
    scale,
    M,
    K,
    x_row,
    GROUP: tl.constexpr,
    UNSIGNED: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = group * GROUP + tl.arange(0, GROUP)[None, :]
    wide = rows.to(tl.int64)[:, None]
    values = tl.load(x + wide * x_row + columns, mask=(rows < M)[:, None], other=0.0)
    values = values.to(tl.float32)
    if UNSIGNED:
        low, high, most = 0.0, 15.0, tl.maximum(tl.max(values, 1), 0.0)
    else:
        low, high, most = -8.0, 7.0, tl.max(tl.abs(values), 1)
    step = tl.div_rn(most, high)
    inverse = tl.div_rn(1.0, tl.where(step == 0, 1.0, step))
    code = tl.clamp(rounded(values * inverse[:, None]), low, high)
    tl.store(codes + wide * K + columns, code.to(tl.int8), mask=(rows < M)[:, None])
    stored = step.to(tl.float16).to(tl.float32) if HALF else as_bfloat16(step)
    tl.store(scale + group * M + rows, stored, mask=rows < M)
