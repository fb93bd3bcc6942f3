"""MXFP8 weights on a CPU: e4m3 by integer shifts, times powers of two, both exact in bfloat16."""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import by_rows, e4m3, grouped, outer_scale, powers
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts

GROUP = 32


def _build(spec: Spec) -> "Multiply":
    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        scale = powers(parts[Role.BLOCK_SCALE][rows], dtype)
        return grouped(e4m3(parts[Role.CODES][rows], dtype), scale, GROUP)

    return by_rows(spec, decode, outer_scale)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"mxfp8"}),
        options=frozenset({"kind=e4m3", "exponent=ceil", "exponent=floor"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
)
