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
#: Sums of products at a time, and rows of the input: both stay in the cache.
SUMS, TOKENS = 1 << 21, 256
#: Rows of the weight at a time, whatever the input's.
FEWEST, MOST = 256, 2048


def _build(spec: Spec) -> "Multiply":
    import torch

    assert spec.activation is not None, "the needs admit quantized activations only"
    n, token = spec.shape_NK[0], spec.activation.granularity == "token"

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        m = len(x_MK)
        fixed = None if token else _tensor_scale(x_MK, parts.get(Role.INPUT_SCALE))
        codes_MK, scale_M1 = _quantized(x_MK, fixed)
        weight_NK = parts[Role.CODES].view(torch.int8)
        y_MN = x_MK.new_empty(m, n)
        step = min(max(SUMS // max(m, 1), FEWEST), MOST)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            width = rows.stop - start
            sums = buffer("sums", m * width, torch.int32).view(m, width)
            torch._int_mm(codes_MK, weight_NK[rows].t(), out=sums)
            _scaled(sums, scale_M1, outer_scale(parts, rows), y_MN[:, rows])
        return y_MN

    return multiply


def _tensor_scale(x_MK: "Tensor", static: "Tensor | None") -> "Tensor":
    """(): the file's own where it holds one."""
    if static is not None:
        return static.float().reshape(())
    low, high = x_MK.aminmax()
    return (-low.float()).maximum(high.float()) / LARGEST


def _quantized(x_MK: "Tensor", fixed: "Tensor | None") -> "tuple[Tensor, Tensor]":
    """round(x / scale) as int8 [M, K], and the scales [M, 1]: the fixed one, or each row's own."""
    import torch

    m, k = x_MK.shape
    codes = buffer("codes", m * k, torch.int8).view(m, k)
    scales = buffer("scales", m, torch.float32).view(m, 1)
    for start in range(0, m, TOKENS):
        rows = slice(start, min(start + TOKENS, m))
        wide = buffer("input", (rows.stop - start) * k, torch.float32).view(rows.stop - start, k)
        wide.copy_(x_MK[rows])
        scales[rows] = _largest(wide) / LARGEST if fixed is None else fixed
        # Any number will do in place of a zero scale: what it divides is zero.
        wide.div_(scales[rows].masked_fill(scales[rows] == 0, 1.0))
        codes[rows] = wide.round_().clamp_(-LARGEST - 1, LARGEST)
    return codes, scales


def _largest(wide: "Tensor") -> "Tensor":
    """The largest magnitude of each row. aminmax along a dimension takes twenty times as long."""
    return (-wide.amin(1, keepdim=True)).maximum(wide.amax(1, keepdim=True))


def _scaled(sums: "Tensor", scale_M1: "Tensor", outer: "Tensor | None", out: "Tensor") -> None:
    """Integer sums times the input's scales and the weight's, rounded once."""
    import torch

    for start in range(0, len(sums), TOKENS):
        rows = slice(start, start + TOKENS)
        wide = buffer("wide", sums[rows].numel(), torch.float32).view(sums[rows].shape)
        wide.copy_(sums[rows]).mul_(scale_M1[rows])
        out[rows] = wide if outer is None else wide.mul_(outer)


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
