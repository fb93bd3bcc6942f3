"""NVFP4 weights on a CPU: a byte is looked up as two bfloat16 numbers, times e4m3 block scales.

A number of two significant bits times a scale of four is exact in bfloat16; the outer scales are
applied to the product.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import by_rows, byte_pairs, grouped, outer_scale, paired
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch

    k, group = spec.shape_NK[1], int(spec.encoding.option("block", "16"))
    divides = spec.encoding.option("tensor_scale", "multiply") == "divide"
    ones = {Role.BLOCK_SCALE: torch.ones(256, 1), Role.TENSOR_SCALE: torch.ones(())}
    pairs = byte_pairs(spec.encoding, ones)

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        scale = parts[Role.BLOCK_SCALE].view(torch.float8_e4m3fn)[rows]
        return grouped(paired(parts[Role.CODES][rows], pairs, k, dtype), scale, group)

    def outer(parts: "Parts") -> "Tensor | None":
        if divides and Role.TENSOR_SCALE in parts:
            inverse = parts[Role.TENSOR_SCALE].float().reciprocal()
            return outer_scale({**parts, Role.TENSOR_SCALE: inverse})
        return outer_scale(parts)

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
)
