"""What the shape of a weight's scale tells, in the dialects that give every granularity one name."""

from math import prod

from diffquant.headers import Tensor
from diffquant.plan import Role


def scale_role(scale: Tensor, rows: int) -> Role:
    """() or [1]: of the tensor; [N], [N, 1], [1, N]: of the rows; anything else: of blocks."""
    if prod(scale.shape) == 1:
        return Role.TENSOR_SCALE
    flat = tuple(size for size in scale.shape if size != 1) == (rows,)
    return Role.CHANNEL_SCALE if flat else Role.BLOCK_SCALE
