"""MXFP8 weights times 16-bit inputs in Triton: e4m3 codes times powers of two, in registers.

The product runs on ordinary tensor cores, from Ampere on. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from diffquant.kernels import Multiply

GROUP = 32


def _build(spec: Spec) -> "Multiply":
    from diffquant.kernels._triton import numbers, weights
    from diffquant.kernels._triton.weight_only import Numbers

    how = Numbers(code=numbers.e4m3, scale=numbers.e8m0, packed=False)
    return weights.product(spec, how, lambda _: GROUP)


KERNEL = Kernel(
    rank=90,
    needs=Needs(
        encodings=frozenset({"mxfp8"}),
        options=frozenset({"kind=e4m3", "exponent=ceil", "exponent=floor"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        devices=frozenset({"cuda"}),
        sm=(80, 122),
        packages=("triton",),
    ),
    build=_build,
    untried=True,
)
