"""SVDQuant INT4 as 4-bit tensor cores compute it, on a CPU: each group of 64 as a product of integers.

Sums of 64 products of codes are exact; scales of input and weight are applied to them in float32, and
nothing is rounded before the end. `reference` rounds both decoded operands to 16 bits instead, 0.2 %
of the product. Runs to predict (`--numerics faithful`): decoding the weight is faster.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import buffer
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

GROUP = 64
#: Sums of products at a time, which stay in the cache.
SUMS = 1 << 18


def _build(spec: Spec) -> "Multiply":
    import torch

    assert spec.activation is not None, "the needs admit quantized activations only"
    unsigned = spec.activation.unsigned
    n, k = spec.shape_NK

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        m = len(x_MK)
        codes_GMJ, scale_GM = _quantized(x_MK, unsigned)
        y_MN = torch.empty(m, n)
        step = max(GROUP, SUMS // max(m, 1))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            scale_GN = parts[Role.BLOCK_SCALE][rows, : k // GROUP].float().t()
            weight_GNJ = _unpacked(parts[Role.CODES][rows])
            y_MN[:, rows] = _summed(codes_GMJ, scale_GM, weight_GNJ, scale_GN)
        return y_MN

    return multiply


def _quantized(x_MK: "Tensor", unsigned: bool) -> "tuple[Tensor, Tensor]":
    """int8 [G, M, 64] and float32 [G, M]. Codes come from the float32 scale, which is then rounded to
    16 bits, as `activations.py` says of Nunchaku's."""
    import torch

    stored = torch.float16 if x_MK.dtype == torch.float16 else torch.bfloat16
    low, high = (0, 15) if unsigned else (-8, 7)
    cells = x_MK.float().unflatten(1, (-1, GROUP))
    largest = cells.amax(2) if unsigned else cells.abs().amax(2)
    scale_MG = largest.clamp(min=0) / high
    inverse = torch.where(scale_MG == 0, 0.0, 1 / scale_MG)
    codes = (cells * inverse[:, :, None]).round_().clamp_(low, high).to(torch.int8)
    return codes.transpose(0, 1).contiguous(), scale_MG.to(stored).float().t().contiguous()


def _unpacked(codes: "Tensor") -> "Tensor":
    """Packed codes [n, K / 2] as int8 [G, n, 64]."""
    import torch

    packed = codes.view(torch.int8).unflatten(1, (-1, GROUP // 2)).transpose(0, 1)
    whole = buffer("groups", 2 * packed.numel(), torch.int8).view(*packed.shape, 2)
    # The sign of a half byte is its highest bit, which a shift to the right spreads.
    whole[..., 0] = (packed * 16).bitwise_right_shift_(4)
    whole[..., 1] = packed >> 4
    return whole.flatten(2)


def _summed(codes: "Tensor", scale_GM: "Tensor", weight: "Tensor", scale_GN: "Tensor") -> "Tensor":
    """The float32 product [M, n]: exact sums of each group, times both of its scales."""
    import torch

    shape = codes.shape[1], weight.shape[1]
    size = shape[0] * shape[1]
    y_MN = buffer("product", size, torch.float32).view(shape).zero_()
    wide = buffer("wide", size, torch.float32).view(shape)
    sums = buffer("sums", size, torch.int32).view(shape)
    for group in range(len(codes)):
        torch._int_mm(codes[group], weight[group].t(), out=sums)
        wide.copy_(sums).mul_(scale_GN[group])
        y_MN.addcmul_(wide, scale_GM[group, :, None])
    return y_MN


KERNEL = Kernel(
    rank=95,
    needs=Needs(
        encodings=frozenset({"int4"}),
        options=frozenset({"group=64"}),
        requires=frozenset({"group=64"}),
        scales=frozenset({Role.BLOCK_SCALE}),
        activations=frozenset({"int4:group64:dynamic", "int4:group64:dynamic:unsigned"}),
        devices=frozenset({"cpu"}),
        multiple_of_K=GROUP,
    ),
    build=_build,
    float32=True,
    predicts=True,
)
