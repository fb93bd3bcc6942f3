"""NVFP4 products by `torch.nn.functional.scaled_mm` on Blackwell, without another package.

    mat_a, mat_b      float4_e2m1fn_x2 [M, K / 2], [K / 2, N]; bits 0-3 hold the even column
    scale_a, scale_b  [e4m3 in 128 x 4 tiles, one per 16 columns; float32 [1]]
                      [BlockWise1x16, TensorWise], [SWIZZLE_32_4_4, NO_SWIZZLE]

The input is quantized by torch operations, one after the other; FlashInfer does it in one, so it is
tried first. The contract is in `_scaled_mm.py`. Not run on hardware.
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
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        held = encoded(x_MK, activation, parts)
        y_MN = scaled_mm(
            held[Role.CODES].view(torch.float4_e2m1fn_x2),
            parts[Role.CODES].view(torch.float4_e2m1fn_x2).t(),
            _two_levels(held),
            recipe,
            _two_levels(parts),
            recipe,
            swizzle,
            swizzle,
            output_dtype=half(x_MK),
        )
        return y_MN.to(x_MK.dtype)

    return multiply


def _two_levels(parts: "Parts") -> "list[Tensor]":
    import torch

    block = tiles(parts[Role.BLOCK_SCALE], torch.float8_e4m3fn)
    return [block, parts[Role.TENSOR_SCALE].float().reshape(1)]


KERNEL = Kernel(
    rank=35,
    needs=Needs(
        encodings=frozenset({"nvfp4"}),
        options=frozenset({"tensor_scale=multiply"}),
        scales=frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE}),
        activations=frozenset({"nvfp4:group16:static", "nvfp4:group16:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(100, 122),
        multiple_of_N=16,
        multiple_of_K=32,
    ),
    build=_build,
    untried=True,
)
