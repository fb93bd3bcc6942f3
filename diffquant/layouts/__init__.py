"""Physical orders of stored tensors, one file each, and how to undo and redo them.

Undoing never changes a number: it permutes, unpacks or drops padding. The axes after undoing are
those of `plan.Role`. Packed 4-bit codes become uint8 [N, K // 2], bits 0-3 holding the even column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffquant.plan import Options, Role
from diffquant.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Order:
    """A physical order. `shape` is the wanted logical shape of the part: for CODES the number of
    features (N, K) whatever the packing, otherwise the axes of its role.

    undo(stored, role, shape, options)     -> canonical tensor
    redo(canonical, role, shape, options)  -> stored tensor; None where nothing writes the order
    """

    undo: "Callable[[Tensor, Role, tuple[int, ...], Options], Tensor]"
    redo: "Callable[[Tensor, Role, tuple[int, ...], Options], Tensor] | None" = None


LAYOUTS: Registry[Order] = Registry("diffquant.layouts", "LAYOUT")
