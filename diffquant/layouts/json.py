"""JSON: a number inside the text of a marker tensor, U8 bytes of an object.

    key   under which the object holds it

Undone it is float32 (). bitsandbytes keeps the offset of its scales so.
"""

import json
from typing import TYPE_CHECKING

from diffquant.errors import PlanError
from diffquant.layouts import Order
from diffquant.plan import Options, Role

if TYPE_CHECKING:
    from torch import Tensor


def undo(stored: "Tensor", role: Role, shape: tuple[int, ...], options: Options) -> "Tensor":
    """The number. Raises PlanError when the bytes are no such object or hold no number there."""
    import torch

    key = dict(options).get("key", "")
    try:
        found = json.loads(bytes(stored.reshape(-1).tolist()))[key]
        return torch.tensor(float(found))
    except (ValueError, TypeError, LookupError) as error:
        raise PlanError(f"{role} is no number under {key!r} of its marker: {error}") from None


LAYOUT = Order(undo=undo)
