"""4-bit codes on a CPU, in two ways: by planes where K allows it, else by looking up bytes.

Planes: two bytes are one 16-bit word of four codes, columns 4w .. 4w + 3 from the lowest bits up.
Shifted by 12, 8, 4 and 0 bits, a whole row of words gives four planes [K / 4] whose top four bits
are codes, so that every step is one pass of vector instructions. The weight then has its columns in
the order 0, 4, 8 … 1, 5, 9 …, and `planes_of` brings those of the input into the same order, which
is a hundredth of the work at the layers of a transformer.

Bytes: each is looked up in a table of two bfloat16 numbers. One core only, and so the slower way.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.encodings import ENCODINGS
from diffquant.kernels._cpu import buffer
from diffquant.plan import Encoding, Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

#: Four copies of a 16-bit number in 64 bits.
FOUR_COPIES = 0x0001000100010001


def by_planes(columns: int, group: int) -> bool:
    """Whether K columns in groups of so many can be decoded in planes."""
    return columns % group == 0 and group % 16 == 0


def planes_of(x_MK: "Tensor") -> "Tensor":
    """The columns of the input in the order of the planes; valid until this thread's next call."""
    m, k = x_MK.shape
    turned = buffer("turned", x_MK.numel(), x_MK.dtype).view(m, 4, k // 4)
    return turned.copy_(x_MK.reshape(m, k // 4, 4).transpose(1, 2)).view(m, k)


def e2m1_planes(codes: "Tensor") -> "Tensor":
    """Packed e2m1 codes [n, K / 2] as bfloat16 planes [n, 4, K / 4], 2^-126 of what they mean.

    s ee m in the top bits becomes s 000000ee m000000 by an arithmetic shift by 6 and a mask: the
    exponent biases are 1 and 127. The one subnormal, 0.5, is one in bfloat16 too.
    """
    import torch

    bits = _lifted(codes).bitwise_right_shift_(6).bitwise_and_(-32320)  # 0x81C0
    return bits.view(torch.bfloat16)


def int4_planes(codes: "Tensor", signed: bool, dtype: "Dtype") -> "Tensor":
    """Packed int4 codes [n, K / 2] as numbers [n, 4, K / 4], exact."""
    bits = _lifted(codes).bitwise_right_shift_(12)
    if not signed:
        bits.bitwise_and_(15)
    return buffer("numbers", bits.numel(), dtype).view(bits.shape).copy_(bits)


def scaled_planes(planes: "Tensor", scale: "Tensor") -> "Tensor":
    """Planes [n, 4, K / 4] times bfloat16 scales [n, G] of groups of columns, as rows [n, K]; in place."""
    n, _, words = planes.shape
    spread = _spread(scale, words // scale.shape[1]).view(n, 1, words)
    return planes.mul_(spread.to(planes.dtype)).view(n, -1)


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


def _lifted(codes: "Tensor") -> "Tensor":
    """int16 [n, 4, K / 4]: each code in the top four bits, with others below it."""
    import torch

    # A view of wider words needs an even offset, which a mapped file does not promise.
    even = codes if codes.storage_offset() % 2 == 0 else codes.clone()
    words = even.view(torch.int16)
    bits = buffer("planes", 4 * words.numel(), torch.int16).view(len(words), 4, -1)
    shifts = torch.tensor([4096, 256, 16, 1], dtype=torch.int16).view(1, 4, 1)
    return torch.mul(words[:, None, :], shifts, out=bits)


def _spread(scale: "Tensor", words: int) -> "Tensor":
    """bfloat16 scales [n, G], each `words` times: [n, G * words]. Four at a time, as one integer."""
    import torch

    n, groups = scale.shape
    wide = buffer("wide", scale.numel(), torch.int64).view(n, groups)
    wide.copy_(scale.contiguous().view(torch.int16)).bitwise_and_(0xFFFF).mul_(FOUR_COPIES)
    copies = words // 4
    if copies == 1:
        return wide.view(torch.bfloat16)
    spread = buffer("spread", wide.numel() * copies, torch.int64).view(n, groups, copies)
    for copy in range(copies):
        spread[:, :, copy] = wide
    return spread.view(torch.bfloat16).view(n, -1)
