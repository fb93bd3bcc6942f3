"""MXFP8 products by `torch.nn.functional.scaled_mm` on Blackwell, without another package.

    scale_a, scale_b  e8m0 in 128 x 4 tiles, one per 32 columns    BlockWise1x32, SWIZZLE_32_4_4

The weight's scales are put into tiles at the call, N * K / 32 bytes. There is no MXFP4: torch makes
that product on AMD only, or with FBGEMM. The contract is in `_scaled_mm.py`. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._scaled_mm import encoded, half, tiles
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    activation = spec.activation
    assert activation is not None, "the needs admit quantized activations only"

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        held = encoded(x_MK, activation, parts)
        y_MN = scaled_mm(
            held[Role.CODES],
            parts[Role.CODES].view(torch.float8_e4m3fn).t(),
            tiles(held[Role.BLOCK_SCALE], torch.float8_e8m0fnu),
            ScalingType.BlockWise1x32,
            tiles(parts[Role.BLOCK_SCALE], torch.float8_e8m0fnu),
            ScalingType.BlockWise1x32,
            SwizzleType.SWIZZLE_32_4_4,
            SwizzleType.SWIZZLE_32_4_4,
            output_dtype=half(x_MK),
        )
        return y_MN.to(x_MK.dtype)

    return multiply


KERNEL = Kernel(
    rank=40,
    needs=Needs(
        encodings=frozenset({"mxfp8"}),
        options=frozenset({"exponent=ceil", "exponent=floor", "kind=e4m3"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        activations=frozenset({"mxfp8:group32:dynamic", "mxfp8;exponent=floor:group32:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(100, 122),
        multiple_of_N=16,
        multiple_of_K=32,
    ),
    build=_build,
    untried=True,
)
