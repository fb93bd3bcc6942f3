"""AWQ (its GEMM version): 32-bit words of eight 4-bit codes along N, both axes exchanged.

    codes        int32 [K, N / 8]
    zero_point   int32 [G, N / 8]
    block_scale  [G, N]

From the lowest bits up a word holds rows 0 2 4 6 1 3 5 7 of its eight. Codes and zero points are 0 .. 15;
undone, both are less 8, which their difference does not see: uint8 [N, K / 2] and int8 [N, G].
"""

from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order, transposed
from diffquant.layouts._nibbles import as_bytes, joined, split
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor

#: Where in a word each of eight rows is.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The part in rows of the weight. Raises PlanError when it is not as large as the shape needs."""
    if role not in (Role.CODES, Role.ZERO_POINT):
        return transposed.undo(stored, role, shape, ())
    length = shape[1] if role is Role.CODES else stored.shape[0]
    wanted = (length, shape[0] // 8)
    if tuple(stored.shape) != wanted or shape[0] % 8 or stored.element_size() != 4:
        raise PlanError(
            f"{role} is stored as {list(stored.shape)} of {stored.dtype}, {list(wanted)} words of "
            f"eight were needed"
        )
    codes = split(as_bytes(stored)).unflatten(1, (-1, 8))[:, :, list(PLACES)].flatten(1).t()
    if role is Role.CODES:
        return joined(codes ^ 8).contiguous()
    import torch

    zeros: Tensor = codes.contiguous().view(torch.int8) - 8
    return zeros


LAYOUT = Order(undo=undo)
