"""Canonical parts of a weight -> the product that decodes it tile by tile.

What kernels beside this folder have in common: which part is which argument of `weight_only`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffquant.kernels import Spec
from diffquant.kernels._cpu import outer_scale
from diffquant.kernels._triton import numbers
from diffquant.kernels._triton.weight_only import WHOLE_ROW, Numbers, multiply
from diffquant.plan import Role

if TYPE_CHECKING:
    from diffquant.kernels import Multiply, Parts

#: Columns of scales -> columns of the weight that share one.
Group = Callable[[int], int]


def product(spec: Spec, how: Numbers, group: Group, *, rows: int = 1) -> "Multiply":
    """x [M, K] -> y [M, N], weight-only. Tensor and channel scales multiply the sums.

    rows  of the weight that share block scales, where there are not scales for each
    """
    n = spec.shape_NK[0]

    def multiplied(x_MK: Tensor, parts: "Parts") -> Tensor:
        scale_NG = _scale(parts.get(Role.BLOCK_SCALE), n, rows, how.scale)
        return multiply(
            x_MK,
            parts[Role.CODES].contiguous().view(torch.uint8),
            n,
            how,
            scale_NG=scale_NG,
            group=WHOLE_ROW if scale_NG is None else group(scale_NG.shape[1]),
            zero_NG=_zero(parts.get(Role.ZERO_POINT), n),
            outer=outer_scale(parts, slice(None)),
        )

    return multiplied


def blocks(spec: Spec, columns: int) -> Group:
    """Two-dimensional blocks of so many columns, or groups that divide K."""
    k = spec.shape_NK[1]
    return lambda count: columns if count == -(-k // columns) else -(-k // count)


def _scale(scale: Tensor | None, n: int, rows: int, read: Any) -> Tensor | None:
    """[N, G], as bytes where they are read as bytes. Blocks of rows are spread over their rows."""
    if scale is None:
        return None
    stored = scale.contiguous()
    stored = stored if read is numbers.number else stored.view(torch.uint8)
    if stored.shape[0] == n:
        return stored
    return stored.repeat_interleave(rows, 0)[:n]


def _zero(zero: Tensor | None, n: int) -> Tensor | None:
    """[N, G], or [N, 1] where one stands for a row or for the whole weight."""
    if zero is None or (zero.ndim == 2 and zero.shape[0] == n):
        return None if zero is None else zero.contiguous()
    return zero.reshape(-1, 1).expand(n, 1)
