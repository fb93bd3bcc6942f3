"""INT8 weights times INT8 inputs on a CPU: products of integers, summed exactly, scaled once.

Half the time of bfloat16, where the processor multiplies bytes (VNNI). For files whose format asks
for int8 inputs, per tensor or per token, and only when it is named, because inputs lose what int8
cannot hold: about 1 % of the product with ordinary inputs, 5 to 9 % where one input channel in a
hundred is thirty times as large as the others and no smoothing was done.
"""

from typing import TYPE_CHECKING

from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import buffer, outer_scale
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor

    from diffquant.kernels import Multiply, Parts

LARGEST = 127
#: Rows of the weight, and of the input, at a time: their sums and codes stay in the cache.
ROWS, TOKENS = 512, 256


def _build(spec: Spec) -> "Multiply":
    import torch

    assert spec.activation is not None, "the needs admit quantized activations only"
    n, token = spec.shape_NK[0], spec.activation.granularity == "token"
    spans = [slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        static = parts.get(Role.INPUT_SCALE)
        scale = _token_scale(x_MK) if token else _tensor_scale(x_MK, static)
        codes_MK, weight_NK = _codes(x_MK, scale), parts[Role.CODES].view(torch.int8)
        y_MN = x_MK.new_empty(len(x_MK), n)
        for rows in spans:
            sums = buffer("sums", len(x_MK) * (rows.stop - rows.start), torch.int32)
            sums = torch._int_mm(codes_MK, weight_NK[rows].t(), out=sums.view(len(x_MK), -1))
            wide = buffer("scaled", sums.numel(), torch.float32).view(sums.shape)
            wide.copy_(sums).mul_(scale)
            outer = outer_scale(parts, rows)
            y_MN[:, rows] = wide if outer is None else wide.mul_(outer)
        return y_MN

    return multiply


def _tensor_scale(x_MK: "Tensor", static: "Tensor | None") -> "Tensor":
    """(): the file's own where it holds one."""
    if static is not None:
        return static.float().reshape(())
    low, high = x_MK.aminmax()
    return (-low.float()).maximum(high.float()) / LARGEST


def _token_scale(x_MK: "Tensor") -> "Tensor":
    """[M, 1]"""
    low, high = x_MK.aminmax(dim=1, keepdim=True)
    return (-low.float()).maximum(high.float()) / LARGEST


def _codes(x_MK: "Tensor", scale: "Tensor") -> "Tensor":
    """round(x / scale) as int8; zeros where the scale is zero."""
    import torch

    m, k = x_MK.shape
    codes = buffer("codes", m * k, torch.int8).view(m, k)
    # Any number will do in place of a zero scale: what it divides is zero.
    divisor = torch.where(scale == 0, 1.0, scale)
    for start in range(0, m, TOKENS):
        rows = slice(start, min(start + TOKENS, m))
        wide = buffer("input", (rows.stop - rows.start) * k, torch.float32).view(-1, k)
        wide.copy_(x_MK[rows]).div_(divisor[rows] if divisor.ndim else divisor)
        codes[rows] = wide.round_().clamp_(-LARGEST - 1, LARGEST)
    return codes


KERNEL = Kernel(
    rank=90,
    needs=Needs(
        encodings=frozenset({"int8"}),
        options=frozenset(),
        scales=frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE}),
        activations=frozenset({"int8:tensor:static", "int8:tensor:dynamic", "int8:token:dynamic"}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    opt_in=True,
)
