"""4-bit codes of a byte tensor, one per element and back."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def as_bytes(stored: "Tensor") -> "Tensor":
    """The same memory as uint8; wider integers spread along the last axis, lowest byte first."""
    import torch

    return stored.contiguous().view(torch.uint8)


def split(stored: "Tensor") -> "Tensor":
    """Codes 0..15, twice as long along the last axis: the low nibble of every byte comes first."""
    import torch

    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)


def joined(codes: "Tensor") -> "Tensor":
    """Bytes of pairs along the last axis: the first of a pair in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4
