"""FP8 weights on a CPU: decode by integer shifts into one reused buffer, multiply in cache-sized chunks.

An e4m3 byte s eeee mmm becomes the bfloat16 number s 0000eeee mmm0000 by a sign-extending widening,
a shift by 4 and a mask. Its value is then 2^-120 of what was meant, because the exponent biases are
7 and 127, and one exact multiplication by 2^120 mends that, subnormals included. Every e4m3 value is
exact in bfloat16, so tensor and channel scales are applied to the product, and block scales to the
chunk. NaN bytes decode to 480 here; `inspect --deep` names files that hold any.

The buffer is one per thread and dtype: a fresh 75 MB tensor per call costs ten times its decoding in
page faults.
"""

import threading
from typing import TYPE_CHECKING

from diffquant.encodings.fp8 import block_cell
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts

#: Values per decoded chunk: 3 MB of bfloat16, which stays in a second-level cache.
CHUNK = 512 * 3072

_scratch = threading.local()


def _build(spec: Spec) -> "Multiply":
    import torch

    n, k = spec.shape_NK
    rows = max(16, min(n, CHUNK // k))
    blocks = Role.BLOCK_SCALE in spec.roles

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        codes_NK = parts[Role.CODES].view(torch.int8)
        y_MN = x_MK.new_empty(x_MK.shape[0], n)
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            chunk = _decoded(codes_NK[start:stop], rows, x_MK.dtype)
            if blocks:
                chunk = _scaled(chunk, parts[Role.BLOCK_SCALE], start, spec)
            # A strided slice is no legal out=; the product of one chunk is small.
            y_MN[:, start:stop] = x_MK @ chunk.T
        for role in (Role.TENSOR_SCALE, Role.CHANNEL_SCALE):
            if role in parts:
                y_MN.mul_(parts[role])
        return y_MN

    return multiply


def _decoded(codes: "Tensor", rows: int, dtype: "Dtype") -> "Tensor":
    """Exact values of e4m3 bytes [n, K], in `dtype`; valid until this thread's next call."""
    import torch

    bits = _buffer("bits", (rows, codes.shape[1]), torch.int16)[: codes.shape[0]]
    bits.copy_(codes).bitwise_left_shift_(4).bitwise_and_(-30736)  # 0x87F0: sign and eeee mmm
    values = bits.view(torch.bfloat16).mul_(2.0**120)
    return values if dtype == torch.bfloat16 else values.to(dtype)


def _scaled(chunk: "Tensor", scale: "Tensor", start: int, spec: Spec) -> "Tensor":
    """The chunk times its block scales: (N / bn, K / bk) with ragged last blocks, or (N, groups)."""
    n, k = spec.shape_NK
    if scale.shape[0] == n:
        rows, columns = scale[start : start + chunk.shape[0]], -(-k // scale.shape[1])
    else:
        cell = block_cell(spec.encoding)
        numbers = range(start, start + chunk.shape[0])
        rows, columns = scale[[number // cell.rows for number in numbers]], cell.columns
    spread = rows.to(chunk.dtype).repeat_interleave(columns, 1)
    return chunk * spread[:, : chunk.shape[1]]


def _buffer(name: str, shape: tuple[int, int], dtype: "Dtype") -> "Tensor":
    import torch

    held = getattr(_scratch, name, None)
    size = shape[0] * shape[1]
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=dtype)
        setattr(_scratch, name, held)
    return held[:size].view(shape)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset({"fp8"}),
        options=frozenset({"kind=e4m3", "block=128x128"}),
        scales=frozenset({Role.TENSOR_SCALE, Role.CHANNEL_SCALE, Role.BLOCK_SCALE}),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
)
