"""FP8 products by `torch._scaled_mm` whose inputs Triton quantizes in one pass; runs when named.

`torch_scaled_mm` quantizes with torch's own operators, six passes over the input that can take longer
than the product on a large GPU. Here it is one, or two for a dynamic scale of the whole tensor. Not
tried first before that was measured. Not run on hardware.
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

    from diffquant.kernels._triton.inputs import amax_of, as_fp8

    assert spec.activation is not None, "the needs admit quantized activations only"
    n = spec.shape_NK[0]
    token = spec.activation.granularity == "token"
    by_rows = token or Role.CHANNEL_SCALE in spec.roles

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        codes_MK, scale_M = as_fp8(x_MK, None if token else amax_of(x_MK, parts))
        outer = outer_scale(parts, slice(None))
        assert outer is not None, "fp8 without a scale is not admitted"
        y_MN = torch._scaled_mm(
            codes_MK,
            parts[Role.CODES].view(torch.float8_e4m3fn).t(),
            scale_a=scale_M[:, None] if by_rows else scale_M[0],
            scale_b=outer.expand(n)[None].contiguous() if by_rows else outer,
            out_dtype=torch.bfloat16,
        )
        return y_MN.to(x_MK.dtype)

    return multiply


KERNEL = Kernel(
    rank=42,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3"}),
        scales=frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
        activations=frozenset({"fp8:tensor:static", "fp8:tensor:dynamic", "fp8:token:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(89, 122),
        multiple_of_N=16,
        multiple_of_K=16,
        packages=("triton",),
    ),
    build=_build,
    opt_in=True,
    untried=True,
)
