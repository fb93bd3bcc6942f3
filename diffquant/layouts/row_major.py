"""Row-major: the axes of the role in their own order; only packing and padding are undone.

    nibbles   low (default): bits 0-3 of a byte hold the even column | high: they hold the odd one
    pad       `crop`: stored axes are longer than the layer's, what lies beyond is padding

Axes of length one do not count: scales of () and (1,), [N] and [N, 1] are the same thing.
"""

from math import prod
from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.layouts._nibbles import as_bytes
from diffquant.layouts._padding import cropped
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The stored tensor in `shape`; packed 4-bit codes as uint8 [N, ceil(K / 2)], even column low.

    Raises PlanError when the numbers of elements disagree and `pad` does not allow cropping.
    """
    chosen = dict(options)
    if is_packed(stored, role, shape, chosen):
        stored, shape = as_bytes(stored), (*shape[:-1], -(-shape[-1] // 2))
        stored = swapped(stored) if chosen.get("nibbles", "low") == "high" else stored
    if "pad" in chosen:
        stored = cropped(stored, shape)
    if stored.numel() != prod(shape):
        raise PlanError(
            f"{role} is stored as {list(stored.shape)}, the layer needs {list(shape)}",
            hint="is the tensor padded, packed or of another layout?",
        )
    return stored.reshape(shape)


def redo(canonical: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The stored tensor: nibbles swapped where asked; no padding is added."""
    high = role is Role.CODES and dict(options).get("nibbles", "low") == "high"
    return swapped(canonical) if high else canonical


def is_packed(
    stored: "Tensor", role: Role, shape: tuple[int, ...], options: dict[str, str]
) -> bool:
    """Whether the tensor holds two 4-bit codes per byte."""
    if role is not Role.CODES or stored.is_floating_point() or stored.element_size() != 1:
        return False
    # Groups on an axis of their own are shorter than K, and whole codes all the same.
    return "nibbles" in options or (stored.ndim < 3 and stored.shape[-1] < shape[-1])


def swapped(codes: "Tensor") -> "Tensor":
    """The two nibbles of every byte exchanged."""
    return codes << 4 | codes >> 4


LAYOUT = Order(undo=undo, redo=redo)
