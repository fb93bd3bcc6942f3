"""What the portable CPU kernels share: decode some rows of the weight, multiply, and go on.

Rows are decoded into a buffer that is reused, one per thread, name and dtype: a fresh 75 MB tensor
per call costs ten times its decoding in page faults. bfloat16 inputs multiply in bfloat16; all
others in float32. Scales of rows and of the whole weight are applied to the product of each chunk
while it is in the cache; each number is rounded once there.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from diffquant.kernels import Spec
from diffquant.kernels._keeping import rows_of
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts

    #: parts, rows, compute dtype -> those rows of the weight but for its outer scales [n, K]; valid
    #: until this thread's next call
    Decode = Callable[[Parts, slice, Dtype], Tensor]
    #: parts, rows -> what the product of those rows is to be multiplied with, () or [n]; None: nothing
    Outer = Callable[[Parts, slice], Tensor | None]
    #: x [M, K] -> its columns in the order in which `Decode` gives them
    Order = Callable[[Tensor], Tensor]

#: Values per decoded chunk: 6 MB of bfloat16, which stays in a third-level cache. Smaller ones decode
#: faster and multiply slower: each product reads the whole input.
CHUNK = 1024 * 3072
#: Rows per chunk at least, for the same reason, where K is large.
ROWS = 256
#: Values at a time where float32 is needed: 1 MB.
WIDE = 256 * 1024

_scratch = threading.local()


def by_rows(
    spec: Spec, decode: "Decode", outer: "Outer", *, order: "Order | None" = None
) -> "Multiply":
    """x [M, K] times a weight that `decode` makes chunk by chunk, times its outer scale."""
    import torch

    n, k = spec.shape_NK
    step = max(ROWS, CHUNK // k)
    spans = [slice(start, min(start + step, n)) for start in range(0, n, step)]

    def multiply(x_MK: "Tensor", parts: "Parts") -> "Tensor":
        wide = x_MK if x_MK.dtype == torch.bfloat16 else x_MK.float()
        y_MN = wide.new_empty(wide.shape[0], n)
        wide = wide if order is None else order(wide)
        for rows in spans:
            chunk, scale = rows_of(parts, rows, wide.dtype, decode).T, outer(parts, rows)
            if scale is None:
                torch.mm(wide, chunk, out=y_MN[:, rows])
                continue
            shape = (len(wide), chunk.shape[1])
            product = buffer("product", shape[0] * shape[1], wide.dtype).view(shape)
            _scaled(torch.mm(wide, chunk, out=product), scale, y_MN[:, rows])
        return y_MN.to(x_MK.dtype)

    return multiply


def _scaled(product: "Tensor", scale: "Tensor", out: "Tensor") -> None:
    """The product times a scale, rounded once."""
    import torch

    if scale.ndim == 0 or product.dtype == torch.float32:
        torch.mul(product, scale, out=out)
        return
    _times_wide(product, scale[None], out)


def _times_wide(values: "Tensor", scale: "Tensor", out: "Tensor") -> None:
    """out = values times float32 scales that broadcast to them, of all rows or of each; rounded once.

    torch widens operands of two dtypes by itself, but into fresh memory: that takes ten times as
    long as the arithmetic.
    """
    import torch

    step = max(1, WIDE * len(values) // max(1, values.numel()))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        wide = buffer("wide", values[rows].numel(), torch.float32).view(values[rows].shape)
        wide.copy_(values[rows]).mul_(scale if len(scale) == 1 else scale[rows])
        out[rows].copy_(wide)


def outer_scale(parts: "Parts", rows: slice) -> "Tensor | None":
    """Channel and tensor scale in float32 as one: the product is rounded once. () or [n]."""
    tensor, channel = parts.get(Role.TENSOR_SCALE), parts.get(Role.CHANNEL_SCALE)
    whole = None if tensor is None else tensor.float().reshape(())
    if channel is None:
        return whole
    each = channel.reshape(-1)[rows].float()
    return each if whole is None else each * whole


def e4m3(codes: "Tensor", dtype: "Dtype") -> "Tensor":
    """Exact values [n, K] of e4m3 bytes, by integer arithmetic."""
    import torch

    values = e4m3_small(codes).mul_(2.0**120)
    return values if dtype == torch.bfloat16 else values.to(dtype)


def e4m3_small(codes: "Tensor", name: str = "bits") -> "Tensor":
    """e4m3 bytes as bfloat16, 2^-120 of what they mean.

    A byte s eeee mmm becomes the bfloat16 number s 0000eeee mmm0000 by a sign-extending widening, a
    shift by 4 (a product with 16 is the faster one) and a mask. That is 2^-120 of what was meant,
    because the exponent biases are 7 and 127, and an exact multiplication by the caller mends it,
    subnormals included. NaN bytes decode to 480.
    """
    import torch

    bits = buffer(name, codes.numel(), torch.int16).view(codes.shape)
    bits.copy_(codes.view(torch.int8)).mul_(16).bitwise_and_(-30736)  # 0x87F0
    return bits.view(torch.bfloat16)


def whole(codes: "Tensor", dtype: "Dtype") -> "Tensor":
    """int8 codes [n, K] as numbers, exact."""
    return buffer("whole", codes.numel(), dtype).view(codes.shape).copy_(codes)


def grouped(chunk: "Tensor", scale: "Tensor", group: int) -> "Tensor":
    """The chunk [n, K] times scales [n, G], one per `group` columns; in place."""
    import torch

    n, k = chunk.shape
    # One-byte scales and powers of two are exact in bfloat16; wider ones would round all of a block
    # the same way, which does not average out.
    scale = scale.to(chunk.dtype) if scale.element_size() == 1 else scale
    if k % group == 0:
        cells = chunk.view(n, -1, group)
        if scale.dtype == chunk.dtype or chunk.dtype == torch.float32:
            cells.mul_(scale[:, :, None])
        else:
            _times_wide(cells, scale[:, :, None], cells)
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


def largest_power(scale: "Tensor") -> int:
    """The largest E8M0 byte b among these, by which `powers` is relative.

    A NaN scale, byte 255, makes the product infinite or NaN and not only its group, so that the run
    stops there as it must.
    """
    import torch

    return int(scale.view(torch.uint8).max()) if scale.numel() else 127


def powers(scale: "Tensor", largest: int, exponent: int) -> "Tensor":
    """E8M0 bytes b [n, G] as bfloat16 2^(b - largest + exponent), with exponent <= 127.

    A byte shifted to where bfloat16 keeps its exponent is the number. What would be below the
    smallest normal number is 0: less than 2^-120 of the largest.
    """
    import torch

    bits = buffer("powers", scale.numel(), torch.int16).view(scale.shape)
    bits.copy_(scale.view(torch.uint8)).add_(127 + exponent - largest).clamp_(min=0).mul_(128)
    return bits.view(torch.bfloat16)


def power_of_two(exponent: int) -> "Tensor":
    """2^exponent as float32 ()."""
    import torch

    return torch.ldexp(torch.ones(()), torch.tensor(exponent))


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
