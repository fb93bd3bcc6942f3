"""Decoded rows that are kept: the same rows, decoded once. Products of either are equal bit by bit.

A kernel that says `keeps` asks `rows_of` for its decoded rows. With ordinary parts they are decoded
at every call, into memory that is used again; with `Keeping` parts a copy of the first decoding stays.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts

    Decode = Callable[[Parts, slice, Dtype], Tensor]


class Keeping(dict[Role, "Tensor"]):
    """Parts of one piece, with the rows of its weight that were decoded before."""

    def __init__(self, parts: "Parts", decoded: "dict[tuple[int, Dtype], Tensor]") -> None:
        super().__init__(parts)
        self.decoded = decoded


class Kept:
    """A kernel's product that keeps what it decodes. One object serves one piece of one layer."""

    def __init__(self, multiply: "Multiply") -> None:
        self.multiply = multiply
        self.decoded: dict[tuple[int, Dtype], Tensor] = {}

    def __call__(self, x_MK: "Tensor", parts: "Mapping[Role, Tensor]") -> "Tensor":
        return self.multiply(x_MK, Keeping(parts, self.decoded))


def rows_of(parts: "Parts", rows: slice, dtype: "Dtype", decode: "Decode") -> "Tensor":
    """Those rows of the weight [n, K], kept where the parts keep them."""
    if not isinstance(parts, Keeping):
        return decode(parts, rows, dtype)
    key = rows.start, dtype
    if key not in parts.decoded:
        parts.decoded[key] = decode(parts, rows, dtype).clone()
    return parts.decoded[key]
