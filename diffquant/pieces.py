"""A piece's stored tensors in canonical order, a layer's dense weight and a plain parameter.

Layout first, rows after: whatever a file's physical order, it is undone on the whole stored tensor
before a row or column of it is taken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffquant.encodings import ENCODINGS
from diffquant.encodings.fp8 import block_cell
from diffquant.layouts import LAYOUTS
from diffquant.plan import (
    DENSE,
    ROW_ROLES,
    Encoding,
    LayerPlan,
    Part,
    Piece,
    Plain,
    PlainSource,
    Role,
    Span,
)
from diffquant.rotation import rotated
from diffquant.tensors import Weights

#: Roles whose last axis runs along K, in columns or in groups of them.
COLUMN_ROLES = frozenset(
    {Role.CODES, Role.SMOOTH, Role.LOWRANK_DOWN, Role.BLOCK_SCALE, Role.OUTER_SCALE}
    | {Role.ZERO_POINT, Role.CORRECTION, Role.NESTED_SCALE}
)
SCALARS = frozenset(
    {Role.TENSOR_SCALE, Role.INPUT_SCALE, Role.INPUT_ZERO_POINT, Role.NESTED_OFFSET}
)


def canonical(piece: Piece, weights: Weights) -> dict[Role, Tensor]:
    """The piece's parts after layout, rows and columns; axes as in `plan.Role`."""
    parts = {part.role: _undone(part, piece, weights) for part in piece.parts}
    _clear_hollow_codes(parts)
    if piece.take:
        _expand_block_rows(parts, piece.encoding, piece.stored_NK[0])
        parts = {role: _taken(role, part, piece.take) for role, part in parts.items()}
    return {role: _cut(role, part, piece) for role, part in parts.items()}


def decoded(piece: Piece, parts: dict[Role, Tensor]) -> Tensor:
    """The stored weight of the piece as float32 [N, K]: neither smoothing nor low rank applied."""
    shape_NK = (len(piece.out), len(piece.cols))
    return ENCODINGS.load(piece.encoding.name).decode(parts, piece.encoding, shape_NK)


def bias_of(layer: LayerPlan, parts: Sequence[dict[Role, Tensor]]) -> Tensor | None:
    """The layer's bias [N] from all its pieces, offsets applied; None when no piece has one.

    A single untouched bias keeps its stored dtype and storage; sums are made in float32.
    """
    placed = [
        (piece, _stored_bias(piece, held))
        for piece, held in zip(layer.pieces, parts, strict=True)
        if Role.BIAS in held or Role.INT_BIAS in held
    ]
    if not placed:
        return None
    first, stored = placed[0]
    if len(placed) == 1 and len(first.out) == layer.shape_NK[0] and not first.bias_offsets:
        return stored
    total = torch.zeros(layer.shape_NK[0], device=stored.device)
    for piece, bias in placed:
        total[piece.out.as_slice()] += _offset(piece, bias.float())
    return total.to(stored.dtype)


def _stored_bias(piece: Piece, parts: dict[Role, Tensor]) -> Tensor:
    """The bias of a piece. An integer one is in steps of the product of integers, and less what the
    zero point z of the input adds to it: int_bias = bias / output_scale - z * sum(codes)."""
    if Role.INT_BIAS not in parts:
        return parts[Role.BIAS]
    steps = parts[Role.INT_BIAS].float() * _output_scale(parts[Role.OUTPUT_SCALE])
    zero = parts[Role.INPUT_ZERO_POINT].float() * parts[Role.INPUT_SCALE].float()
    return steps + zero * decoded(piece, parts).sum(1)


def _output_scale(stored: Tensor) -> Tensor:
    """Ascend's operators take float32 scales as bits in the low half of an int64."""
    if stored.dtype != torch.int64:
        return stored.float()
    return stored.view(torch.int32)[0::2].view(torch.float32)


def dense(layer: LayerPlan, weights: Weights) -> tuple[Tensor, Tensor | None]:
    """The one plain linear equal to the layer with activations unquantized: float32 W [N, K], b [N].

    Smoothing, rotation and low rank are folded into W, the shift of a GELU-fed layer into b.
    """
    parts = [canonical(piece, weights) for piece in layer.pieces]
    weight = torch.zeros(layer.shape_NK)
    bias = bias_of(layer, parts)
    total = torch.zeros(layer.shape_NK[0])
    if bias is not None:
        total[: len(bias)] = bias.float()
    for piece, held in zip(layer.pieces, parts, strict=True):
        folded, shifted = _folded(piece, held)
        weight[piece.out.as_slice(), piece.cols.as_slice()] += folded
        total[piece.out.as_slice()] += shifted
    shifts = any(piece.shift for piece in layer.pieces)
    return weight, None if bias is None and not shifts else total


def plain_value(plain: Plain, weights: Weights) -> Tensor:
    """A parameter that is no linear weight, in its own shape and as stored; decoded ones as float32."""
    taken = [_given(source, weights) for source in plain.sources]
    joined = taken[0] if len(taken) == 1 else torch.cat(taken)
    return joined.reshape(plain.shape)


def _given(source: PlainSource, weights: Weights) -> Tensor:
    if source.encoding != DENSE:
        return _table(source, weights)
    (part,) = source.parts
    stored = weights.tensor(part.ref.file, part.ref.name)
    cuts = [stored[span.as_slice()] for span in source.take]
    return torch.cat(cuts) if cuts else stored


def _table(source: PlainSource, weights: Weights) -> Tensor:
    """A quantized embedding or table, as float32."""
    assert source.stored_NK is not None, "the planner gives every encoded source its shape"
    n, k = source.stored_NK
    piece = Piece(
        encoding=source.encoding,
        stored_NK=source.stored_NK,
        parts=source.parts,
        out=Span(0, n),
        cols=Span(0, k),
        take=source.take,
    )
    return decoded(piece, canonical(piece, weights))


def _folded(piece: Piece, parts: dict[Role, Tensor]) -> tuple[Tensor, Tensor]:
    """W and the bias that `shift` stands for, so that W x + b is the piece for any raw x."""
    weight = rotated(decoded(piece, parts), piece.rotation)
    low = None
    if piece.lowrank_input is not None:
        low = parts[Role.LOWRANK_UP].float() @ parts[Role.LOWRANK_DOWN].float()
    if low is not None and piece.lowrank_input == "smoothed":
        weight, low = weight + low, None
    if piece.smooth is not None:
        smooth = parts[Role.SMOOTH].float()
        weight = weight * smooth if piece.smooth == "multiply" else weight / smooth
    shifted = piece.shift * weight.sum(1)
    return (weight if low is None else weight + low), shifted


def _undone(part: Part, piece: Piece, weights: Weights) -> Tensor:
    stored = weights.tensor(part.ref.file, part.ref.name)
    shape = logical_shape(part.role, stored, piece.encoding, piece.stored_NK)
    order = LAYOUTS.load(part.layout.name)
    return order.undo(stored, part.role, shape, part.layout.options)


def logical_shape(
    role: Role, stored: Tensor, encoding: Encoding, stored_NK: tuple[int, int]
) -> tuple[int, ...]:
    """The axes a part has once its layout is undone; counts not told by N and K come from its size."""
    n, k = stored_NK
    if role in SCALARS:
        return ()
    if role is Role.BIAS:
        # Writers that pad the weight leave the bias as it was.
        return (min(n, stored.numel()),)
    if role is Role.CODES:
        return (n, k)
    if role in (Role.SMOOTH, Role.GROUP_INDEX):
        return (k,)
    if role is Role.LOWRANK_DOWN:
        return (stored.numel() // k, k)
    if role is Role.LOWRANK_UP:
        return (n, stored.numel() // n)
    if role in (Role.BLOCK_SCALE, Role.NESTED_SCALE):
        return _scale_shape(stored, encoding, stored_NK)
    grouped = role in (Role.OUTER_SCALE, Role.CORRECTION)
    if grouped or (role is Role.ZERO_POINT and stored.numel() != n):
        return (n, stored.numel() // n)
    return (n,) if role in ROW_ROLES else tuple(stored.shape)


def _scale_shape(stored: Tensor, encoding: Encoding, stored_NK: tuple[int, int]) -> tuple[int, ...]:
    n, k = stored_NK
    group = ENCODINGS.load(encoding.name).group
    if group is not None:
        return (n, -(-k // int(encoding.option("block", str(group)))))
    # More rows than the weight has are groups of it, one below the other.
    if stored.numel() % n == 0 and (n in stored.shape or stored.shape[0] > n):
        return (n, stored.numel() // n)
    if stored.dim() == 4:
        # ModelOpt writes blocks as [N / rows, 1, K / columns, 1], either count may be 1 as well.
        return (stored.shape[0], stored.shape[2])
    squeezed = tuple(size for size in stored.shape if size != 1)
    return squeezed if len(squeezed) == 2 else tuple(stored.shape)


def _clear_hollow_codes(parts: dict[Role, Tensor]) -> None:
    """ModelOpt writes NaN codes beside the zero scale of a weight, or row, that is all zero; a product
    of the two would be NaN. Only such rows are touched, and the file's own bytes never."""
    codes = parts.get(Role.CODES)
    if codes is None or codes.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return
    for role in (Role.TENSOR_SCALE, Role.CHANNEL_SCALE):
        scale = parts.get(role)
        if scale is not None and not bool(scale.all()):
            hollow = (scale == 0).reshape(-1, 1).expand(codes.shape[0], 1)
            bare = codes.view(torch.uint8).masked_fill(hollow, 0)
            parts[Role.CODES] = codes = bare.view(codes.dtype)


def _expand_block_rows(parts: dict[Role, Tensor], encoding: Encoding, n: int) -> None:
    """Two-dimensional blocks become one row of scales per weight row, so that rows can be taken. The
    last block may be lower than the others."""
    scale = parts.get(Role.BLOCK_SCALE)
    if scale is not None and scale.shape[0] != n:
        named, count = block_cell(encoding).rows, scale.shape[0]
        rows = named if count == -(-n // named) else -(-n // count)
        parts[Role.BLOCK_SCALE] = scale.repeat_interleave(rows, dim=0)[:n]


def _taken(role: Role, part: Tensor, take: Sequence[Span]) -> Tensor:
    if role not in ROW_ROLES or not part.dim():
        return part
    cuts = [_bytes_first(part)[span.as_slice()] for span in take]
    joined = cuts[0] if len(cuts) == 1 else torch.cat(cuts)
    return joined.contiguous().view(part.dtype)


def _bytes_first(part: Tensor) -> Tensor:
    """float8 has no concatenation on every device; its bytes have."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


def _cut(role: Role, part: Tensor, piece: Piece) -> Tensor:
    """The piece's own columns, no padded ones: codes by columns or bytes, scales by groups."""
    wanted, stored = len(piece.cols), piece.stored_NK[1]
    if role not in COLUMN_ROLES or wanted == stored or not part.dim():
        return part
    first = part.shape[-1] * piece.skip // stored
    keep = -(-part.shape[-1] * wanted // stored)
    return part[..., first : first + keep].contiguous()


def _offset(piece: Piece, bias: Tensor) -> Tensor:
    if not piece.bias_offsets:
        return bias
    moved = bias.clone()
    for offset in piece.bias_offsets:
        moved[offset.rows.as_slice()] += offset.value
    return moved
