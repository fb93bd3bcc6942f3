"""What the portable CPU kernels share: decode some rows of the weight, multiply, and go on.

Rows are decoded into a buffer that is reused, one per thread, name and size: a fresh 75 MB tensor
per call costs ten times its decoding in page faults. bfloat16 inputs multiply in bfloat16; all
others in float32. Scales of rows and of the whole weight are applied to the product, in one step.
"""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import ENCODINGS
from diffquant.kernels import Spec
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts

    #: parts, rows, compute dtype -> those rows of the weight but for its outer scales [n, K]; valid
    #: until this thread's next call
    Decode = Callable[[Parts, slice, Dtype], Tensor]
    #: parts -> what the product is to be multiplied with, () or [N]; None for nothing
    Outer = Callable[[Parts], Tensor | None]

#: Values per decoded chunk: 3 MB of bfloat16, which stays in a second-level cache.
CHUNK = 512 * 3072

_scratch = threading.local()


def by_rows(spec: Spec, decode: "Decode", outer: "Outer") -> "Multiply":
    """x [M, K] times a weight that `decode` makes chunk by chunk, times its outer scale."""
    import torch

    n, k = spec.shape_NK
    step = max(16, min(n, CHUNK // k))

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        wide = x_MK if x_MK.dtype == torch.bfloat16 else x_MK.float()
        y_MN = wide.new_empty(wide.shape[0], n)
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            # A strided slice is no legal out=; the product of one chunk is small.
            y_MN[:, rows] = wide @ decode(parts, rows, wide.dtype).T
        scale = outer(parts)
        if scale is not None:
            y_MN.mul_(scale)
        return y_MN.to(x_MK.dtype)

    return multiply


def outer_scale(parts: "Parts") -> "Tensor | None":
    """Channel and tensor scale in float32 as one: the product is rounded once. () or [N]."""
    scale = None
    for role in (Role.TENSOR_SCALE, Role.CHANNEL_SCALE):
        if role in parts:
            found = parts[role].float().squeeze()
            scale = found if scale is None else scale * found
    return scale


def byte_pairs(encoding: Encoding, ones: "Mapping[Role, Tensor]") -> "Tensor":
    """int32 [256]: the two bfloat16 values of every byte of 4-bit codes, as the codec reads them.

    ones  scales that mean one, for 256 rows of two columns
    """
    import torch

    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    values = ENCODINGS.load(encoding.name).decode({Role.CODES: codes, **ones}, encoding, (256, 2))
    return values.to(torch.bfloat16).view(torch.int32).reshape(256)


def paired(codes: "Tensor", pairs: "Tensor", columns: int, dtype: "Dtype") -> "Tensor":
    """Exact values [n, K] of packed codes [n, ceil(K / 2)]."""
    import torch

    count = codes.numel()
    index = buffer("index", count, torch.int32).copy_(codes.reshape(-1).view(torch.uint8))
    found = buffer("pairs", count, torch.int32)
    torch.index_select(pairs, 0, index, out=found)
    values = found.view(torch.bfloat16).view(len(codes), -1)[:, :columns]
    return values if dtype == torch.bfloat16 else values.to(dtype)


def e4m3(codes: "Tensor", dtype: "Dtype") -> "Tensor":
    """Exact values [n, K] of e4m3 bytes, by integer shifts.

    A byte s eeee mmm becomes the bfloat16 number s 0000eeee mmm0000 by a sign-extending widening, a
    shift by 4 and a mask. That is 2^-120 of what was meant, because the exponent biases are 7 and
    127, and one exact multiplication mends it, subnormals included. NaN bytes decode to 480.
    """
    import torch

    bits = buffer("bits", codes.numel(), torch.int16).view(codes.shape)
    bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(4).bitwise_and_(-30736)  # 0x87F0
    values = bits.view(torch.bfloat16).mul_(2.0**120)
    return values if dtype == torch.bfloat16 else values.to(dtype)


def whole(codes: "Tensor", dtype: "Dtype") -> "Tensor":
    """int8 codes [n, K] as numbers, exact."""
    return buffer("whole", codes.numel(), dtype).view(codes.shape).copy_(codes)


def grouped(chunk: "Tensor", scale: "Tensor", group: int) -> "Tensor":
    """The chunk [n, K] times scales [n, G], one per `group` columns; in place."""
    n, k = chunk.shape
    # One-byte scales and powers of two are exact in bfloat16; wider ones would round all of a block
    # the same way, which does not average out.
    scale = scale.to(chunk.dtype) if scale.element_size() == 1 else scale
    if k % group == 0:
        chunk.view(n, -1, group).mul_(scale[:, :, None])
        return chunk
    return chunk.mul_(scale.repeat_interleave(group, 1)[:, :k])


def shifted(chunk: "Tensor", offset: "Tensor", rows: slice, n: int) -> "Tensor":
    """The chunk plus offsets of the weight (), of rows [N] or of groups [N, G]; in place."""
    if offset.numel() == 1:
        return chunk.add_(offset.reshape(()))
    if offset.numel() == n:
        return chunk.add_(offset.reshape(n, 1)[rows])
    spread = offset[rows].repeat_interleave(-(-chunk.shape[1] // offset.shape[1]), 1)
    return chunk.add_(spread[:, : chunk.shape[1]])


def blocked(
    chunk: "Tensor", scale: "Tensor", rows: slice, cell: tuple[int, int], n: int
) -> "Tensor":
    """The chunk times its block scales: [N / bn, K / bk] with ragged last blocks, or [N, G] groups."""
    k = chunk.shape[1]
    if scale.shape[0] == n:
        columns = cell[1] if scale.shape[1] == -(-k // cell[1]) else -(-k // scale.shape[1])
        return grouped(chunk, scale[rows], columns)
    numbers = [row // cell[0] for row in range(rows.start, rows.stop)]
    return grouped(chunk, scale[numbers], cell[1])


def powers(scale: "Tensor", dtype: "Dtype") -> "Tensor":
    """E8M0 bytes as numbers: 2^(b - 127), 255 is NaN."""
    import torch

    table = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
    table[255] = torch.nan
    return table.to(dtype)[scale.view(torch.uint8).int()]


def buffer(name: str, size: int, dtype: "Dtype") -> "Tensor":
    """This thread's buffer of that name and dtype, flat and of that size; grown as needed."""
    import torch

    key = f"{name} {dtype}"
    held = getattr(_scratch, key, None)
    if held is None or held.numel() < size:
        # Born in inference mode, it could not be written outside of it, where the next call may be.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=dtype)
        setattr(_scratch, key, held)
    return held[:size]
