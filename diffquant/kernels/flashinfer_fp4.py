"""NVFP4 products by FlashInfer on Blackwell: `nvfp4_quantize` for the input, `mm_fp4` (CUTLASS).

    nvfp4_quantize(x [M, K], 1 / outer [1])      -> codes [M, K / 2], scales in 128 x 4 tiles
    mm_fp4(codes_a, codes_b.T, scales_a, scales_b.T, alpha [1], dtype) -> [M, N]

`alpha` is the product of both outer scales; codes_b.T is a column-major view. The weight's scales are
put into tiles at the call, N * K / 16 bytes. Source: docstrings and requirements of FlashInfer's
`gemm_base.py`. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.layouts import tiles_128x4
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

#: The largest E2M1 value times the largest e4m3 scale.
LARGEST = 6.0 * 448.0
SMALLEST_SCALE = 1e-12


def _build(spec: Spec) -> "Multiply":
    import torch
    from flashinfer import SfLayout, mm_fp4, nvfp4_quantize

    n, k = spec.shape_NK
    assert spec.activation is not None, "the needs admit quantized activations only"
    static = spec.activation.mode == "static"

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        half = x_MK if x_MK.dtype == torch.float16 else x_MK.bfloat16()
        outer = parts[Role.INPUT_SCALE].float().reshape(1) if static else _outer(half)
        codes_a, scales_a = nvfp4_quantize(
            half.contiguous(), 1 / outer, sfLayout=SfLayout.layout_128x4, do_shuffle=False
        )
        y_MN: Tensor = mm_fp4(
            codes_a,
            parts[Role.CODES].t(),
            scales_a.view(torch.uint8),
            _tiles(parts[Role.BLOCK_SCALE], n, k).t(),
            outer * parts[Role.TENSOR_SCALE].float(),
            half.dtype,
            backend="cutlass",
        )
        return y_MN.to(x_MK.dtype)

    return multiply


def _outer(x_MK: "Tensor") -> "Tensor":
    """[1] float32: the scale above the block scales of a dynamic input."""
    return (x_MK.abs().amax().float() / LARGEST).clamp_min(SMALLEST_SCALE).reshape(1)


def _tiles(scale_NG: "Tensor", n: int, k: int) -> "Tensor":
    """uint8 [N up to a multiple of 128, K / 16], the order tensor cores read."""
    import torch

    return tiles_128x4.redo(scale_NG.view(torch.uint8), Role.BLOCK_SCALE, (n, k // 16), ())


KERNEL = Kernel(
    rank=30,
    needs=Needs(
        encodings=frozenset({"nvfp4"}),
        options=frozenset({"tensor_scale=multiply"}),
        scales=frozenset({Role.BLOCK_SCALE, Role.TENSOR_SCALE}),
        activations=frozenset({"nvfp4:group16:static", "nvfp4:group16:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(100, 122),
        multiple_of_N=32,
        multiple_of_K=64,
        packages=("flashinfer-python",),
    ),
    build=_build,
    untried=True,
)
