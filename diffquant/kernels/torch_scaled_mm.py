"""FP8 products by `torch._scaled_mm`: both operands e4m3, scales applied in the accumulator.

Runs on CUDA from compute capability 8.9 on, for tensor scales (static or dynamic activations) and
for row scales (per-channel weights with per-token activations). The second operand is the
transposed view of [N, K] row-major codes, made at the call, which is the column-major order cuBLAS
asks for. Both dimensions must be multiples of 16.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

#: The largest finite e4m3 value.
MAX = 448.0


def _build(spec: Spec) -> "Multiply":
    import torch

    assert spec.activation is not None, "the needs admit quantized activations only"
    token = spec.activation.granularity == "token"
    n = spec.shape_NK[0]

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        scale_a = _input_scale(x_MK, parts, token)
        codes_MK = (x_MK.float() / scale_a).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
        scale_b = _weight_scale(parts, n, token)
        wide = x_MK.dtype if x_MK.dtype == torch.bfloat16 else torch.bfloat16
        y_MN = torch._scaled_mm(
            codes_MK, parts[Role.CODES].t(), scale_a=scale_a, scale_b=scale_b, out_dtype=wide
        )
        return y_MN.to(x_MK.dtype)

    return multiply


def _input_scale(x_MK: "Tensor", parts: "Parts", token: bool) -> "Tensor":
    """() for a tensor, [M, 1] for tokens; the file's own when it holds one."""
    if Role.INPUT_SCALE in parts and not token:
        return parts[Role.INPUT_SCALE].float()
    amax = x_MK.abs().amax(dim=1, keepdim=True) if token else x_MK.abs().amax()
    return (amax.float() / MAX).clamp_min(1e-12)


def _weight_scale(parts: "Parts", n: int, token: bool) -> "Tensor":
    if token:
        return parts[Role.CHANNEL_SCALE].float().reshape(1, n)
    return parts[Role.TENSOR_SCALE].float()


KERNEL = Kernel(
    rank=40,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3"}),
        scales=frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
        activations=frozenset({"fp8:tensor:static", "fp8:tensor:dynamic", "fp8:token:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(89, 130),
        multiple_of_N=16,
        multiple_of_K=16,
    ),
    build=_build,
    untried=True,
)
