"""E2M1, the 4-bit float of OCP microscaling: sign bit 3, then 0 0.5 1 1.5 2 3 4 6."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)

#: The code where each grid of magnitudes starts to count, and the number whose floats have its step.
GRIDS = ((0, 1.5 * 2**22), (2, 1.5 * 2**23), (4, 1.5 * 2**24))


def codes(values: "Tensor") -> "Tensor":
    """Nearest codes, ties to even, saturated, uint8. Small negative numbers become -0 (code 8).

    The steps between magnitudes are 1/2 below 2, 1 below 4 and 2 above. Rounding to each of the three
    grids and numbering its points gives three codes, of which the right one is the smallest. Adding a
    large number rounds to a grid, and leaves the point's number in the low byte of the sum.
    """
    import torch

    # Adding zero makes -0 positive: only negative numbers have the sign bit.
    held = values.float().clamp(-7, 7).add_(0.0)
    sign = (held.view(torch.int32) >> 28).to(torch.uint8).bitwise_and_(8)
    size, total = held.abs_(), torch.empty_like(held)
    best = torch.full_like(sign, 7)
    for first, grid in GRIDS:
        torch.add(size, grid, out=total)
        point = total.view(torch.int32).to(torch.uint8)
        torch.minimum(best, point.add_(first), out=best)
    return best.bitwise_or_(sign)
