"""MXFP4 weights on a CPU: codes to bfloat16 by integer shifts, times powers of two.

Both are exact; the outer scales of the dual form, one per 512 columns, are rounded once. Scales are
powers relative to the largest of the weight, which is applied to the product. Where K does not
divide into groups a byte is looked up as two numbers.
"""

from typing import TYPE_CHECKING

from diffquant.encodings._e8m0 import values
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import (
    by_rows,
    grouped,
    largest_power,
    outer_scale,
    power_of_two,
    powers,
)
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

GROUP, OUTER_GROUP = 32, 512
ONE = 127  # as an E8M0 byte
#: Codes come out of the shifts 2^-126 of what they mean.
MENDED = 126


def _build(spec: Spec) -> "Multiply":
    dual = Role.OUTER_SCALE in spec.roles
    return _planes(spec) if by_planes(spec.shape_NK[1], GROUP) and not dual else _bytes(spec)


def _planes(spec: Spec) -> "Multiply":
    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        scale = parts[Role.BLOCK_SCALE][rows]
        relative = powers(scale, largest_power(scale), MENDED)
        return scaled_planes(e2m1_planes(parts[Role.CODES][rows]), relative).to(dtype)

    def largest(parts: "Parts", rows: slice) -> "Tensor":
        return power_of_two(largest_power(parts[Role.BLOCK_SCALE][rows]) - ONE)

    return by_rows(spec, decode, largest, order=planes_of)


def _bytes(spec: Spec) -> "Multiply":
    import torch

    n, k = spec.shape_NK
    one = torch.full((256, 1), ONE, dtype=torch.uint8)
    pairs = byte_pairs(spec.encoding, {Role.BLOCK_SCALE: one})

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        chunk = paired(parts[Role.CODES][rows], pairs, k, dtype)
        grouped(chunk, values(parts[Role.BLOCK_SCALE][rows]).to(dtype), GROUP)
        if Role.OUTER_SCALE in parts:
            grouped(chunk, parts[Role.OUTER_SCALE].reshape(n, -1)[rows], OUTER_GROUP)
        return chunk

    return by_rows(spec, decode, outer_scale)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"mxfp4"}),
        options=frozenset({"exponent=ceil", "exponent=floor"}),
        scales=frozenset({Role.BLOCK_SCALE, Role.OUTER_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
