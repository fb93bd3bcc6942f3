"""Halves: groups as rows of their own, of which those far apart share a byte (optimum-quanto).

    bits      4 (default): two rows to a byte | 2: four
    numbers   of zero points: plain (default) | negated: what is stored is subtracted

A weight [N, K] in groups of g is [R, g] with R = N * K / g. Stored are uint8 [ceil(R / 2), g]: the lowest
bits hold the first half of the rows, the next ones the second; for 2 bits quarters. Codes of either
become uint8 [N, K / 2], four bits each. Scales and zero points are [R, 1] and become [N, G].
"""

from math import prod
from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._nibbles import joined
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The part in rows of the weight. Raises PlanError when it is not as large as the shape needs."""
    chosen = dict(options)
    if role is not Role.CODES:
        _require(stored, role, shape, stored.numel() == prod(shape))
        negated = role is Role.ZERO_POINT and chosen.get("numbers", "plain") == "negated"
        return (-stored if negated else stored).reshape(shape)
    import torch

    bits, cells = int(chosen.get("bits", "4")), prod(shape)
    rows = cells // stored.shape[-1]
    shares = 8 // bits
    fits = stored.shape[0] == -(-rows // shares) and rows * stored.shape[-1] == cells
    _require(stored, role, shape, fits and shape[1] % 2 == 0)
    mask = (1 << bits) - 1
    parted = [stored >> bits * share & mask for share in range(shares)]
    return joined(torch.cat(parted)[:rows].reshape(shape))


def _require(stored: "Tensor", role: Role, shape: tuple[int, ...], fits: bool) -> None:
    if not fits:
        raise PlanError(
            f"{role} is stored as {list(stored.shape)}, which is no {list(shape)} in groups of rows"
        )


LAYOUT = Order(undo=undo)
