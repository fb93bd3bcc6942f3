"""FP8 weights times 16-bit inputs in Triton: e4m3 codes become numbers in registers.

The product runs on ordinary tensor cores, from Ampere on, which has none for FP8; and in blocks of
scales, which `torch_scaled_mm` does not do. Not run on hardware.
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

    scale = numbers.number if Role.BLOCK_SCALE in spec.roles else None
    how = Numbers(code=numbers.e4m3, scale=scale, packed=False)
    cell = block_cell(spec.encoding)
    return weights.product(spec, how, weights.blocks(spec, cell.columns), rows=cell.rows)


KERNEL = Kernel(
    rank=90,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3", "block=128x128", "scale=none"}),
        scales=frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE, Role.BLOCK_SCALE}),
        devices=frozenset({"cuda"}),
        sm=(80, 122),
        packages=("triton",),
    ),
    build=_build,
    untried=True,
)
