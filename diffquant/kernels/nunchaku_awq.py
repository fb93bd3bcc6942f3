"""INT4 weight-only products by the AWQ operator of Nunchaku: the modulation layers of its files.

    awq_gemv_w4a16_cuda(in_feats= [m, K], kernel= int32 [N / 4, K / 2], scaling_factors= [K / 64, N],
        zeros= [K / 64, N], m=, n=, k=, group_size=64) -> [m, N], m from 1 to 8

weight = code * scale + zero. Modulation reads one row per picture; more than eight go in turns.
Source: signature and docstring of `nunchaku/ops/gemv.py`, 1.2. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.layouts import nunchaku_awq
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

GROUP, TOKENS = 64, 8
ORDERED = frozenset({Role.CODES, Role.BLOCK_SCALE, Role.ZERO_POINT})


def _build(spec: Spec) -> "Multiply":
    import torch
    from nunchaku.ops.gemv import awq_gemv_w4a16_cuda

    n, k = spec.shape_NK

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        half = (x_MK if x_MK.dtype == torch.float16 else x_MK.bfloat16()).contiguous()
        products = [
            awq_gemv_w4a16_cuda(
                in_feats=rows,
                kernel=parts[Role.CODES],
                scaling_factors=parts[Role.BLOCK_SCALE].to(half),
                zeros=parts[Role.ZERO_POINT].to(half),
                m=len(rows),
                n=n,
                k=k,
                group_size=GROUP,
            )
            for rows in half.split(TOKENS)
        ]
        return torch.cat(products).to(x_MK.dtype)

    return multiply


def _prepare(parts: "Parts", spec: Spec) -> "dict[Role, Tensor]":
    """The codes in Nunchaku's order, scales and zeros [G, N] without padded groups."""
    groups = spec.shape_NK[1] // GROUP
    cut = {role: parts[role][:, :groups] for role in ORDERED - {Role.CODES}}
    whole = {**parts, **cut}
    ordered = {role: nunchaku_awq.redo(whole[role], role, spec.shape_NK, ()) for role in ORDERED}
    return {**parts, **ordered}


def _restore(parts: "Parts", spec: Spec) -> "dict[Role, Tensor]":
    n, k = spec.shape_NK
    grid = (n, k // GROUP)
    shapes = {Role.CODES: (n, k), Role.BLOCK_SCALE: grid, Role.ZERO_POINT: grid}
    rows = {role: nunchaku_awq.undo(parts[role], role, shapes[role], ()) for role in ORDERED}
    return {**parts, **rows}


KERNEL = Kernel(
    rank=20,
    needs=Needs(
        encodings=frozenset({"int4"}),
        options=frozenset({"group=64", "signed=false", "zero=scaled"}),
        scales=frozenset({Role.BLOCK_SCALE, Role.ZERO_POINT}),
        layouts=frozenset({"nunchaku_awq"}),
        devices=frozenset({"cuda"}),
        sm=(80, 122),
        # Its wheels hold neither Hopper's code nor that of datacenter Blackwell, and none to compile.
        without_sm=(90, 120),
        multiple_of_N=4,
        multiple_of_K=64,
        packages=("nunchaku",),
    ),
    build=_build,
    prepare=_prepare,
    restore=_restore,
    untried=True,
)
