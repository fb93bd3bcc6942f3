"""Block FP8 products by `torch.nn.functional.scaled_mm` on Hopper: weights in 128 x 128 blocks, inputs
in groups of 128 per token.

    scale_a  float32 [M, K / 128], strides (1, M)                       BlockWise1x128
    scale_b  float32 [K / 128 up to a multiple of 4, N / 128], K first  BlockWise128x128

cuBLAS has this on sm90 alone. Rows taken from a fused layer carry scales of their own; they are blocks
again where each 128 of them agree. The contract is in `_scaled_mm.py`. Not run on hardware.
"""

from typing import TYPE_CHECKING

from diffquant.errors import KernelError
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._scaled_mm import encoded, half
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

BLOCK = 128


def _build(spec: Spec) -> "Multiply":
    from torch.nn.functional import ScalingType, pad, scaled_mm

    activation = spec.activation
    assert activation is not None, "the needs admit quantized activations only"

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        held = encoded(x_MK, activation, parts)
        scale_b = parts[Role.BLOCK_SCALE].float()
        y_MN = scaled_mm(
            held[Role.CODES],
            parts[Role.CODES].t(),
            held[Role.BLOCK_SCALE].t().contiguous().t(),
            ScalingType.BlockWise1x128,
            pad(scale_b, (0, -scale_b.shape[1] % 4)).t(),
            ScalingType.BlockWise128x128,
            output_dtype=half(x_MK),
        )
        return y_MN.to(x_MK.dtype)

    return multiply


def _prepare(parts: "Parts", spec: Spec) -> "dict[Role, Tensor]":
    """Block scales [N / 128, K / 128]. Raises KernelError where rows of a block differ."""
    import torch

    scale, (n, _) = parts[Role.BLOCK_SCALE], spec.shape_NK
    if scale.shape[0] != n:
        return dict(parts)
    blocks = scale[::BLOCK].contiguous()
    if not torch.equal(blocks.repeat_interleave(BLOCK, 0), scale):
        raise KernelError(
            f"rows taken out of a fused layer of block fp8 do not fall on blocks of {BLOCK}",
            hint="--kernel reference",
        )
    return {**parts, Role.BLOCK_SCALE: blocks}


KERNEL = Kernel(
    rank=40,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3", "block=128x128"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        activations=frozenset({"fp8:group128:dynamic"}),
        devices=frozenset({"cuda"}),
        sm=(90, 91),
        multiple_of_N=BLOCK,
        multiple_of_K=BLOCK,
    ),
    build=_build,
    prepare=_prepare,
    untried=True,
)
