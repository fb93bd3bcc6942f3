"""NVFP4 weights on a CPU: codes to bfloat16 by integer shifts, times e4m3 block scales.

A number of two significant bits times a scale of four is exact in bfloat16; the outer scales are
applied to the product. Where K does not divide into groups a byte is looked up as two numbers.
NaN block scales decode to 480; `inspect --deep` names files that hold them.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import by_rows, e4m3_small, grouped, outer_scale
from diffquant.kernels._cpu_nibbles import (
    by_planes,
    byte_pairs,
    e2m1_planes,
    paired,
    planes_of,
    scaled_planes,
)
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts
    from diffquant.kernels._cpu import Outer

#: Codes come out of the shifts 2^-126, scales 2^-120 of what they mean. Scales times 2^238 are the
#: largest that fit, and leave 2^8 to the product.
SCALE_STEPS, PRODUCT = (2.0**119, 2.0**119), 2.0**8


def _build(spec: Spec) -> "Multiply":
    group = int(spec.encoding.option("block", "16"))
    divides = spec.encoding.option("tensor_scale", "multiply") == "divide"

    def outer(parts: "Parts", rows: slice) -> "Tensor | None":
        if divides and Role.TENSOR_SCALE in parts:
            inverse = parts[Role.TENSOR_SCALE].float().reciprocal()
            return outer_scale({**parts, Role.TENSOR_SCALE: inverse}, rows)
        return outer_scale(parts, rows)

    if by_planes(spec.shape_NK[1], group):
        return _planes(spec, outer)
    return _bytes(spec, group, outer)


def _planes(spec: Spec, outer: "Outer") -> "Multiply":
    import torch

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        scale = e4m3_small(parts[Role.BLOCK_SCALE][rows], "scales")
        for step in SCALE_STEPS:
            scale.mul_(step)
        return scaled_planes(e2m1_planes(parts[Role.CODES][rows]), scale).to(dtype)

    def mended(parts: "Parts", rows: slice) -> "Tensor":
        scale = outer(parts, rows)
        return torch.tensor(PRODUCT) if scale is None else scale * PRODUCT

    return by_rows(spec, decode, mended, order=planes_of)


def _bytes(spec: Spec, group: int, outer: "Outer") -> "Multiply":
    import torch

    k = spec.shape_NK[1]
    ones = {Role.BLOCK_SCALE: torch.ones(256, 1), Role.TENSOR_SCALE: torch.ones(())}
    pairs = byte_pairs(spec.encoding, ones)

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        scale = parts[Role.BLOCK_SCALE].view(torch.float8_e4m3fn)[rows]
        return grouped(paired(parts[Role.CODES][rows], pairs, k, dtype), scale, group)

    return by_rows(spec, decode, outer)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"nvfp4"}),
        options=frozenset(
            {"block=16", "block=32", "outer=none", "tensor_scale=multiply", "tensor_scale=divide"}
        ),
        scales=frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
