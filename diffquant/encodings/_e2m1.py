"""E2M1, the 4-bit float of OCP microscaling: sign bit 3, then 0 0.5 1 1.5 2 3 4 6."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = MAGNITUDES + tuple(-magnitude for magnitude in MAGNITUDES)


def codes(values: "Tensor") -> "Tensor":
    """Nearest codes, ties to even, saturated, uint8. Small negative numbers become -0 (code 8).

    The steps between magnitudes are 1/2 below 2, 1 below 4 and 2 above. Rounding to each of the three
    grids and numbering its points gives three codes, of which the right one is the smallest.
    """
    import torch

    values = values.float()
    size = values.abs()
    found = (size * 2).round_()
    found = torch.minimum(found, size.round().add_(2), out=found)
    found = torch.minimum(found, size.div_(2).round_().add_(4), out=found).clamp_(max=7)
    return found.to(torch.uint8) | (values < 0).to(torch.uint8) << 3
