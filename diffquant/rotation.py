"""Group-wise orthogonal transforms of a layer's input.

The regular Hadamard transform has the 4-point factor

    + + + -
    + + - +
    + - + +
    - + + +

and, for a group of g = 4^n columns, its n-fold Kronecker power divided by sqrt(g). It is symmetric
and its own inverse. Unlike a Sylvester matrix no column is constant, so the mean of a group is not
gathered in one coefficient. Powers of two that are no powers of four end with one sum/difference
stage. Source: ConvRot as ComfyUI and SGLang store it.
"""

from functools import lru_cache

import torch
from torch import Tensor

from diffquant.plan import Rotation


def rotated(x_MK: Tensor, rotation: Rotation | None) -> Tensor:
    """x with every group of columns transformed; the same tensor when there is no rotation."""
    if rotation is None:
        return x_MK
    group = rotation.group
    matrix = _regular_hadamard(group).to(x_MK.device, x_MK.dtype)
    turned: Tensor = (x_MK.unflatten(-1, (-1, group)) @ matrix).flatten(-2)
    return turned


@lru_cache(maxsize=8)
def _regular_hadamard(size: int) -> Tensor:
    four = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while matrix.shape[0] * 4 <= size:
        matrix = torch.kron(matrix, four)
    if matrix.shape[0] < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.div(size**0.5)
