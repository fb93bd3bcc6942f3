"""What Nunchaku's two SVDQuant kernels share: 4-bit products by its compiled operators.

    svdq_quantize_w4a4_act_fuse_lora_cuda(x [M, K], lora_down=, smooth=, fp4=, pad_size=256)
        -> codes [M up to 256, K / 2], scales [G, M up to 256], low [M up to 256, R]: opaque
    svdq_gemm_w4a4_cuda(act=, wgt=, out= [M, N], ascales=, wscales=, lora_act_in=, lora_up=, bias=,
        fp4=, alpha=, wcscales=)

The first divides by `smooth` and multiplies the undivided input with `lora_down`, the second adds the
low-rank branch, so both are taken over from the linear. Weights are held in Nunchaku's own order: what
a file stores so comes out of `prepare` byte for byte, but for rows that were taken from a fused layer.
`alpha` must be a number of Python, which a tensor on the device is not: a tensor scale is given as a
scale of every row.

The first operator makes signed codes only. Layers behind GELU, whose int4 codes are unsigned, go to
another kernel; upstream runs them in one operator with the layer before.

Source: signatures and docstrings of `nunchaku/ops/{quantize,gemm}.py`, 1.2. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Spec
from diffquant.layouts import nunchaku_mma
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

FUSES = frozenset({Role.SMOOTH, Role.LOWRANK_DOWN, Role.LOWRANK_UP})
TOKENS, RANK = 256, 16
#: Vectors and matrices in tiles; other parts have one number, or are the linear's.
TILED = FUSES | {Role.CODES, Role.BLOCK_SCALE, Role.CHANNEL_SCALE}


def build(spec: Spec, *, fp4: bool) -> "Multiply":
    """The product in 4 bits, low rank included."""
    import torch
    from nunchaku.ops.gemm import svdq_gemm_w4a4_cuda
    from nunchaku.ops.quantize import svdq_quantize_w4a4_act_fuse_lora_cuda

    n, k = spec.shape_NK

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        half = (x_MK if x_MK.dtype == torch.float16 else x_MK.bfloat16()).contiguous()
        # The operators have no way without smoothing and low rank.
        smooth = parts.get(Role.SMOOTH, half.new_ones(k))
        down = parts.get(Role.LOWRANK_DOWN, half.new_zeros(k, RANK))
        up = parts.get(Role.LOWRANK_UP, half.new_zeros(n, RANK))
        codes, scales, low = svdq_quantize_w4a4_act_fuse_lora_cuda(
            half, lora_down=down.to(half), smooth=smooth.to(half), fp4=fp4, pad_size=TOKENS
        )
        y_MN = half.new_empty(len(half), n)
        svdq_gemm_w4a4_cuda(
            act=codes,
            wgt=parts[Role.CODES],
            out=y_MN,
            ascales=scales,
            wscales=parts[Role.BLOCK_SCALE] if fp4 else parts[Role.BLOCK_SCALE].to(half),
            lora_act_in=low,
            lora_up=up.to(half),
            bias=None,
            fp4=fp4,
            alpha=1.0,
            wcscales=_rows(parts, half, n) if fp4 else None,
        )
        return y_MN.to(x_MK.dtype)

    return multiply


def _rows(parts: "Parts", like: "Tensor", n: int) -> "Tensor":
    """The outer scale of every row [N], in tiles."""
    rows = parts.get(Role.CHANNEL_SCALE, like.new_ones(n)).to(like)
    return rows * parts[Role.TENSOR_SCALE].to(like) if Role.TENSOR_SCALE in parts else rows


def prepare(parts: "Parts", spec: Spec) -> "dict[Role, Tensor]":
    """The parts in tiles, as `layouts/nunchaku_mma.py` draws them."""
    held = {role: part for role, part in parts.items() if role not in TILED}
    return held | {
        role: nunchaku_mma.redo(parts[role], role, tuple(parts[role].shape), ())
        for role in TILED & parts.keys()
    }


def restore(parts: "Parts", spec: Spec) -> "dict[Role, Tensor]":
    """The parts in canonical rows."""
    n, k = spec.shape_NK
    scale, down = parts[Role.BLOCK_SCALE], parts.get(Role.LOWRANK_DOWN)
    rank = 0 if down is None else down.shape[1]
    shapes = {
        Role.CODES: (n, k),
        Role.BLOCK_SCALE: (n, scale.shape[0]),
        Role.CHANNEL_SCALE: (n,),
        Role.SMOOTH: (k,),
        Role.LOWRANK_DOWN: (rank, k),
        Role.LOWRANK_UP: (n, rank),
    }
    held = {role: part for role, part in parts.items() if role not in TILED}
    return held | {
        role: nunchaku_mma.undo(parts[role], role, shapes[role], ())
        for role in TILED & parts.keys()
    }
