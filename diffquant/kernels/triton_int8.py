"""INT8 weights times 16-bit inputs in Triton: codes less their zero point become numbers in registers.

The product runs on ordinary tensor cores, from Ampere on. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from diffquant.kernels import Multiply


def _build(spec: Spec) -> "Multiply":
    from diffquant.encodings.fp8 import block_cell
    from diffquant.kernels._triton import numbers, weights
    from diffquant.kernels._triton.weight_only import Numbers

    how = Numbers(
        code=numbers.signed8,
        scale=numbers.number if Role.BLOCK_SCALE in spec.roles else None,
        zero="subtracted" if Role.ZERO_POINT in spec.roles else "none",
        packed=False,
    )
    cell = block_cell(spec.encoding)
    return weights.product(spec, how, weights.blocks(spec, cell.columns), rows=cell.rows)


KERNEL = Kernel(
    rank=90,
    needs=Needs(
        encodings=frozenset({"int8"}),
        scales=frozenset(
            {Role.TENSOR_SCALE, Role.CHANNEL_SCALE, Role.BLOCK_SCALE, Role.ZERO_POINT}
        ),
        devices=frozenset({"cuda"}),
        sm=(80, 122),
        packages=("triton",),
    ),
    build=_build,
    untried=True,
)
