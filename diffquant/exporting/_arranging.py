"""Canonical parts -> one stored tensor: rows of all members together, in the dialect's own order.

`pad` grows N and K where the dialect asks for it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS
from diffquant.errors import FormatError
from diffquant.formats import Outgoing, OutgoingLayer
from diffquant.layouts import LAYOUTS
from diffquant.plan import Piece, Role, Span
from diffquant.tensors import DTYPES

Take = tuple[Span, ...]

#: How a tensor that a writer says nothing of is spelled; packed codes and exponents are bytes.
SPELLED: Mapping[torch.dtype, str] = {
    dtype: name for name, dtype in DTYPES.items() if name not in ("F8_E8M0", "F4")
}


def scattered(held: Sequence[Tensor], takes: Sequence[Take], name: str) -> Tensor:
    """Rows of all members under each other, each where the reader will take it from."""
    if len(held) == 1 and not takes[0]:
        return held[0]
    if len({part.dtype for part in held}) > 1:
        raise FormatError(f"{name!r} would join tensors of different dtypes")
    whole = torch.cat([_bytes(part) for part in held])
    if any(takes):
        whole = torch.empty_like(whole).index_copy_(0, _rows(takes, len(whole)), whole)
    return whole.view(held[0].dtype)


def _rows(takes: Sequence[Take], count: int) -> Tensor:
    numbers = torch.arange(count)
    return torch.cat([numbers[span.as_slice()] for take in takes for span in take])


def joined_blocks(
    held: Sequence[Tensor], counts: Sequence[int], takes: Sequence[Take], name: str
) -> Tensor:
    """Scales of blocks of rows. Members may share a weight only where blocks end with them."""
    if len(held) == 1 and not takes[0]:
        return held[0]
    sizes = {count / len(part) for count, part in zip(counts, held, strict=True)}
    total = sum(counts)
    moved = any(takes) and not torch.equal(_rows(takes, total), torch.arange(total))
    if len(sizes) > 1 or not sizes.pop().is_integer() or moved:
        raise FormatError(f"{name!r} would join weights across their blocks of rows")
    return torch.cat(list(held))


def _bytes(part: Tensor) -> Tensor:
    """float8 has no concatenation on every device; its bytes have."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


def padded(whole: Tensor, role: Role, shape_NK: tuple[int, int], pad: int, piece: Piece) -> Tensor:
    """Grown to multiples of `pad`: codes and scales by zeros, smoothing by ones."""
    n, k = (-(-size // pad) * pad for size in shape_NK)
    if (n, k) == shape_NK or role not in (Role.CODES, Role.BLOCK_SCALE, Role.SMOOTH):
        return whole
    group = ENCODINGS.load(piece.runs_as.name).group or 1
    shape = {
        Role.CODES: (n, whole.shape[-1] * k // shape_NK[1]),
        Role.BLOCK_SCALE: (n, -(-k // group)),
        Role.SMOOTH: (k,),
    }[role]
    raw = _bytes(whole)
    grown = raw.new_full(shape, 1 if role is Role.SMOOTH else 0)
    grown[tuple(slice(size) for size in raw.shape)] = raw
    return grown.view(whole.dtype)


def ordered(
    whole: Tensor, part: Outgoing, shape_NK: tuple[int, int], layer: OutgoingLayer
) -> Tensor:
    """The tensor in the dtype, physical order and axes of the dialect."""
    if part.role is not Role.CODES:
        whole = _exact(whole, part)
    order = LAYOUTS.load(part.layout.name)
    if order.redo is None:
        raise FormatError(f"nothing writes the layout {part.layout}")
    pad = layer.pad
    padded = tuple(-(-size // pad) * pad for size in shape_NK)
    shape = padded if part.role is Role.CODES else tuple(whole.shape)
    stored = order.redo(whole, part.role, shape, part.layout.options)
    if part.role is Role.CODES and part.dtype is not None and stored.element_size() == 1:
        stored = stored.view(DTYPES[part.dtype])
    axes = {"one": (1,), "column": (-1, 1), "blocks": (*stored.shape[:1], 1, *stored.shape[1:], 1)}
    return stored if part.axes is None else stored.reshape(axes[part.axes])


def _exact(whole: Tensor, part: Outgoing) -> Tensor:
    """The tensor in the dialect's dtype. Raises FormatError where that would round it."""
    dtype = whole.dtype if part.dtype is None else DTYPES[part.dtype]
    if whole.dtype == dtype:
        return whole
    if whole.element_size() == 1 and dtype.itemsize == 1:
        return whole.view(dtype)
    cast = whole.to(dtype)
    if not whole.is_meta and not torch.equal(cast.to(whole.dtype), whole):
        raise FormatError(f"{part.tensor!r} is {SPELLED[whole.dtype]} and no exact {part.dtype}")
    return cast


def offset(source: Piece, target: Piece, bias: Tensor) -> Tensor:
    """The bias as the target's offsets want it; untouched where both have the same."""
    if source.bias_offsets == target.bias_offsets:
        return bias
    moved = bias.float()
    for piece, sign in ((source, 1.0), (target, -1.0)):
        for offset in piece.bias_offsets:
            moved[offset.rows.as_slice()] += sign * offset.value
    return moved.to(bias.dtype)
