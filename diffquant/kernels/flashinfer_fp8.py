"""FP8 products by FlashInfer's `bmm_fp8` with one scale per tensor; it runs when named by --kernel.

    bmm_fp8(codes_a [1, M, K], codes_b [1, K, N] column-major, scale_a, scale_b, dtype) -> [1, M, N]

It calls the same cuBLAS that `torch_scaled_mm` does, or CUTLASS on Blackwell, so the one that needs
no package is tried first. Source: docstrings and requirements of FlashInfer's `gemm_base.py`. Not run
on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

#: The largest finite e4m3 value.
MAX = 448.0
SMALLEST_SCALE = 1e-12


def _build(spec: Spec) -> "Multiply":
    import torch
    from flashinfer import bmm_fp8

    assert spec.activation is not None, "the needs admit quantized activations only"
    static = spec.activation.mode == "static"

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        scale = parts[Role.INPUT_SCALE].float().reshape(()) if static else _scale(x_MK)
        codes_MK = (x_MK.float() / scale).clamp(-MAX, MAX).to(torch.float8_e4m3fn)
        y_BMN: Tensor = bmm_fp8(
            codes_MK.unsqueeze(0),
            parts[Role.CODES].t().unsqueeze(0),
            scale,
            parts[Role.TENSOR_SCALE].float().reshape(()),
            x_MK.dtype if x_MK.dtype == torch.float16 else torch.bfloat16,
            backend="auto",
        )
        return y_BMN[0].to(x_MK.dtype)

    return multiply


def _scale(x_MK: "Tensor") -> "Tensor":
    return (x_MK.abs().amax().float() / MAX).clamp_min(SMALLEST_SCALE)


KERNEL = Kernel(
    rank=45,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3"}),
        scales=frozenset({Role.TENSOR_SCALE}),
        activations=frozenset({"fp8:tensor:static", "fp8:tensor:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(89, 122),
        multiple_of_N=16,
        multiple_of_K=16,
        packages=("flashinfer-python",),
    ),
    build=_build,
    opt_in=True,
    untried=True,
)
