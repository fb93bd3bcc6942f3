"""MXFP8 weights on a CPU: e4m3 by integer shifts, times powers of two, both exact in bfloat16.

The powers are relative to the largest, which is applied to the product; what mends the shifts is in
them, so that a chunk is multiplied once.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import (
    by_rows,
    e4m3_small,
    grouped,
    largest_power,
    power_of_two,
    powers,
)
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts

GROUP = 32
ONE = 127  # as an E8M0 byte
#: Codes come out of the shifts 2^-120 of what they mean.
MENDED = 120


def _build(spec: Spec) -> "Multiply":
    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        scale = parts[Role.BLOCK_SCALE][rows]
        relative = powers(scale, largest_power(scale), MENDED)
        return grouped(e4m3_small(parts[Role.CODES][rows]), relative, GROUP).to(dtype)

    def largest(parts: "Parts", rows: slice) -> "Tensor":
        return power_of_two(largest_power(parts[Role.BLOCK_SCALE][rows]) - ONE)

    return by_rows(spec, decode, largest)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"mxfp8"}),
        options=frozenset({"kind=e4m3", "exponent=ceil", "exponent=floor"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
