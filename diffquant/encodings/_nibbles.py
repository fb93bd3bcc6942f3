"""Two 4-bit codes per byte: bits 0-3 hold the even column, bits 4-7 the odd one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def pair_table(values: Sequence[float], like: "Tensor") -> "Tensor":
    """Float32 [256, 2]: what a byte's low and high nibble mean, on the device of `like`."""
    import torch

    sixteen = torch.tensor(values, dtype=torch.float32, device=like.device)
    low, high = sixteen.repeat(16), sixteen.repeat_interleave(16)
    return torch.stack((low, high), dim=1)


def unpacked(packed: "Tensor", table: "Tensor", columns: int) -> "Tensor":
    """Values [rows, columns] of bytes [rows, ceil(columns / 2)] through a `pair_table`."""
    pairs = table.index_select(0, packed.reshape(-1).int())
    return pairs.view(len(packed), -1)[:, :columns]


def packed(codes: "Tensor") -> "Tensor":
    """Codes 0..15, uint8 [rows, columns], as bytes; an odd last column is paired with 0."""
    from torch import int16, uint8
    from torch.nn.functional import pad

    if codes.shape[1] % 2:
        codes = pad(codes, (0, 1))
    pairs = codes.contiguous().view(int16)  # the odd column is in the higher byte
    return (pairs >> 4).bitwise_or_(pairs).to(uint8)
