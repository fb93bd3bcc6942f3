"""FP8 products in Triton: inputs become e4m3 in one pass, per token or tensor, and codes multiply codes.

For what `torch_scaled_mm` refuses: N or K that 16 does not divide, and one weight scale beside a
scale per token. Ada and Hopper. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import outer_scale
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch

    from diffquant.kernels._triton import fp8
    from diffquant.kernels._triton.inputs import amax_of, as_fp8

    assert spec.activation is not None, "the needs admit quantized activations only"
    token = spec.activation.granularity == "token"

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        codes_MK, scale_M = as_fp8(x_MK, None if token else amax_of(x_MK, parts))
        outer = outer_scale(parts, slice(None))
        assert outer is not None, "fp8 without a scale is not admitted"
        weight_NK = parts[Role.CODES].view(torch.float8_e4m3fn)
        return fp8.multiply(codes_MK, scale_M, weight_NK, outer, x_MK.dtype)

    return multiply


KERNEL = Kernel(
    rank=60,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3"}),
        scales=frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
        activations=frozenset({"fp8:tensor:static", "fp8:tensor:dynamic", "fp8:token:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(89, 91),
        packages=("triton",),
    ),
    build=_build,
    untried=True,
)
