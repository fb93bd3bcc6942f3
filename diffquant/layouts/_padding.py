"""Growing tensors to whole tiles and cutting them back."""

from operator import lt
from typing import TYPE_CHECKING

from diffquant.errors import PlanError

if TYPE_CHECKING:
    from torch import Tensor


def up(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def cropped(tensor: "Tensor", shape: tuple[int, ...]) -> "Tensor":
    """The leading part of every axis, contiguous; the tensor itself when nothing lies beyond.

    Raises PlanError when an axis is too short.
    """
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    if tensor.ndim != len(shape) or any(map(lt, tensor.shape, shape)):
        raise PlanError(f"a tensor of {list(tensor.shape)} holds no {list(shape)}")
    return tensor[tuple(slice(length) for length in shape)].contiguous()


def padded(tensor: "Tensor", shape: tuple[int, ...], value: float = 0) -> "Tensor":
    """The tensor with every axis grown at its end by `value`."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    grown = tensor.new_full(shape, value)
    grown[tuple(slice(length) for length in tensor.shape)] = tensor
    return grown
