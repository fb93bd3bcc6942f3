"""Plan -> a file of some dialect, bit for bit what the plan holds: nothing is quantized again.

A writer names the tensors (`formats.Export`); here their bytes are made: canonical parts, stacked as
the dialect fuses them, in its physical order. Before the first byte is written the header that the
file will have is read by the dialect's own reader. Its plan must be the one that came in, so a file
that would be read differently is refused; and it tells the order of rows, which no writer repeats.

Letters: N output features, K input features. `pad` grows both where the dialect asks for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffquant import headers, planner
from diffquant.encodings import ENCODINGS
from diffquant.errors import ConvertError, FormatError
from diffquant.families import Inventory
from diffquant.formats import FORMATS, Export, Outgoing, OutgoingLayer
from diffquant.layouts import LAYOUTS
from diffquant.pieces import canonical, decoded
from diffquant.plan import (
    DENSE,
    ROW_ROLES,
    LayerPlan,
    Piece,
    Plain,
    PlainSource,
    Plan,
    Recode,
    Role,
    Span,
)
from diffquant.recode import Encoder, encoded
from diffquant.sources import Checkpoint
from diffquant.tensors import DTYPES, Weights
from diffquant.writing import GIB, Declared, Progress, write, write_file

Member = tuple[str, int]
Take = tuple[Span, ...]

#: How a tensor that a writer says nothing of is spelled; packed codes and exponents are bytes.
SPELLED: Mapping[torch.dtype, str] = {
    dtype: name for name, dtype in DTYPES.items() if name not in ("F8_E8M0", "F4")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything about a file but its bytes.

    plan    what the dialect's own reader will make of it
    losses  what the dialect cannot say; empty: lossless
    """

    format: str
    export: Export
    tensors: tuple[Declared, ...]
    plan: Plan
    losses: tuple[str, ...]

    @property
    def total_size(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def is_folder(self) -> bool:
        return self.export.config is not None


def writable() -> tuple[str, ...]:
    """Dialects that have a way out."""
    return tuple(name for name, known in FORMATS.load_all().items() if known.write is not None)


def prepare(plan: Plan, format_name: str, *, export: Export | None = None) -> Prepared:
    """The file of a dialect that holds a settled plan; pieces with a recode are written as encoded.

    export  what the dialect's writer says, unless it is given

    Raises FormatError for what the dialect cannot say, with the layer and the reason.
    """
    if plan.open:
        raise FormatError(f"{plan.open[0].topic} is open: {plan.open[0].why}")
    export = export or _export(plan, format_name)
    weights = Weights([Path(file.path) for file in plan.files])
    shapes = _Parts(plan, _Shapes(weights))
    sketch = tuple(_Tensor(name, value) for name, value in _drawn(plan, export, shapes))
    read = _read_back(plan, format_name, export, sketch)
    losses = tuple(_losses(plan, export, read))
    parts = _Parts(plan, weights)
    for layer in export.layers:
        _require_one(layer, parts)
    return Prepared(
        format=format_name,
        export=export,
        tensors=tuple(_declared(plan, export, parts, read, sketch)),
        plan=read,
        losses=losses,
    )


def save(
    prepared: Prepared,
    output: Path,
    *,
    origin: str = "",
    max_shard_size: int = 10 * GIB,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write what was prepared: a component folder, or one file where the dialect is one.

    Raises ConvertError when the output is in the way or of the wrong kind.
    """
    export = prepared.export
    if export.config is None:
        if output.suffix != ".safetensors":
            raise ConvertError(
                f"{prepared.format} is one file, {str(output)!r} names a folder",
                hint=f"{output / 'transformer.safetensors'}",
            )
        metadata = {"format": "pt", **export.metadata}
        return (write_file(output, prepared.tensors, metadata=metadata, overwrite=overwrite),)
    done = write(
        output,
        prepared.tensors,
        origin=origin,
        config=export.config,
        metadata=export.metadata,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        on_progress=on_progress,
    )
    return done.shards


def _export(plan: Plan, format_name: str) -> Export:
    writer = FORMATS.load(format_name).write
    if writer is None:
        raise FormatError(
            f"nothing writes {format_name} files", hint=f"one of: {', '.join(writable())}"
        )
    return writer(plan)


# parts -----------------------------------------------------------------------------------------------


class _Shapes(Weights):
    """The same tensors without data, so that shapes come from the very code that makes bytes."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def tensor(self, file: int, name: str) -> Tensor:
        return torch.empty_like(self._weights.tensor(file, name), device="meta")


class _Parts:
    """Canonical parts of a plan's pieces. A recoded piece is encoded once, while its parts are asked
    for in a row."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._weights = weights
        self._encoder = Encoder(plan, weights)
        self._pieces = {
            (layer.path, index): piece
            for layer in plan.layers
            for index, piece in enumerate(layer.pieces)
        }
        self._encoded: dict[Member, dict[Role, Tensor]] = {}

    def piece(self, member: Member) -> Piece:
        return self._pieces[member]

    def has(self, member: Member, role: Role) -> bool:
        piece = self.piece(member)
        made = frozenset[Role]() if piece.recode is None else piece.recode.roles
        return role in made or piece.part(role) is not None

    def get(self, member: Member, role: Role) -> Tensor | None:
        """The part with the axes of `plan.Role`, None when the piece has none."""
        if not self.has(member, role):
            return None
        piece = self.piece(member)
        if piece.recode is not None and role is not Role.BIAS:
            return self._made(member, piece, piece.recode)[role]
        alone = replace(piece, parts=tuple(part for part in piece.parts if part.role is role))
        if role is Role.BLOCK_SCALE and piece.take:
            self._require_rows(member, alone)
        return canonical(alone, self._weights)[role]

    def _made(self, member: Member, piece: Piece, recode: Recode) -> dict[Role, Tensor]:
        if member not in self._encoded:
            held = canonical(piece, self._weights)
            made = _sketched(piece, held, recode) if isinstance(self._weights, _Shapes) else None
            self._encoded = {member: made or self._encoder.parts(piece, held)}
        return self._encoded[member]

    def _require_rows(self, member: Member, alone: Piece) -> None:
        """Blocks of rows cannot be cut between their rows."""
        whole = canonical(replace(alone, take=()), self._weights)[Role.BLOCK_SCALE]
        if whole.shape[0] != alone.stored_NK[0]:
            raise FormatError(
                f"{member[0]!r} is cut from a weight in blocks of "
                f"{alone.stored_NK[0] // whole.shape[0]} rows, which cannot be stored alone"
            )


def _sketched(piece: Piece, held: dict[Role, Tensor], recode: Recode) -> dict[Role, Tensor]:
    """Shapes and dtypes of what a recode makes, computed without data."""
    n, k = len(piece.out), len(piece.cols)
    weight = held[Role.CODES] if piece.encoding == DENSE else torch.empty(n, k, device="meta")
    rank = recode.rank
    if rank is None:
        return encoded(weight, recode)
    made = encoded(weight.float(), replace(recode, rank=None))
    rank = min(rank, n, k)
    low = {"dtype": torch.bfloat16, "device": "meta"}
    made[Role.LOWRANK_UP] = torch.empty(n, rank, **low)  # type: ignore[call-overload]
    made[Role.LOWRANK_DOWN] = torch.empty(rank, k, **low)  # type: ignore[call-overload]
    return made


# stored tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the file to be, without data."""

    name: str
    sketch: Tensor

    def header(self, dtype: str | None, start: int) -> headers.Tensor:
        spelled = dtype or SPELLED[self.sketch.dtype]
        size = self.sketch.numel() * self.sketch.element_size()
        return headers.Tensor(self.name, spelled, tuple(self.sketch.shape), 0, start, start + size)


def _drawn(plan: Plan, export: Export, parts: _Parts) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file, rows in the order of the members."""
    for layer in export.layers:
        for part in _present(layer, parts):
            yield part.tensor, _stored(layer, part, parts, None)
    for name, rows in export.plain.items():
        yield name, _plain(plan, rows, parts, None)


def _declared(
    plan: Plan, export: Export, parts: _Parts, read: Plan, sketch: Sequence[_Tensor]
) -> Iterator[Declared]:
    """The same tensors, to be made when their turn comes, rows in the order the reader wants."""
    placed = {
        (layer.path, index): piece.take
        for layer in read.layers
        for index, piece in enumerate(layer.pieces)
    }
    plain = {item.name: item.sources[0].take for item in read.plain}
    dtypes = _dtypes(export)
    makers: dict[str, Any] = {
        part.tensor: partial(_stored, layer, part, parts, placed, read)
        for layer in export.layers
        for part in layer.parts
    }
    makers |= {
        name: partial(_plain, plan, rows, parts, plain) for name, rows in export.plain.items()
    }
    for tensor in sketch:
        header = tensor.header(dtypes.get(tensor.name), 0)
        yield Declared(tensor.name, header.dtype, header.shape, makers[tensor.name])


def _dtypes(export: Export) -> dict[str, str | None]:
    return {part.tensor: part.dtype for layer in export.layers for part in layer.parts}


def _present(layer: OutgoingLayer, parts: _Parts) -> Iterator[Outgoing]:
    for part in layer.parts:
        if part.filled is not None or any(parts.has(each, part.role) for each in layer.members):
            yield part


def _stored(
    layer: OutgoingLayer,
    part: Outgoing,
    parts: _Parts,
    placed: Mapping[Member, Take] | None,
    read: Plan | None = None,
) -> Tensor:
    """One tensor as the file holds it. `placed` tells where each member's rows go."""
    held = [_held(member, part, parts) for member in layer.members]
    if read is not None and part.role is Role.BIAS:
        held = [
            _offset(parts.piece(member), _piece(read, member), bias)
            for member, bias in zip(layer.members, held, strict=True)
        ]
    if part.role in ROW_ROLES and held[0].dim():
        takes = [() if placed is None else placed[member] for member in layer.members]
        whole = _scattered(held, takes, layer)
    else:
        whole = held[0]
    n = sum(len(parts.piece(member).out) for member in layer.members)
    first = parts.piece(layer.members[0])
    whole = _padded(whole, part.role, (n, len(first.cols)), layer.pad, first)
    return _ordered(whole, part, (n, len(first.cols)), layer)


def _held(member: Member, part: Outgoing, parts: _Parts) -> Tensor:
    found = parts.get(member, part.role)
    if found is not None:
        return found
    codes = parts.get(member, Role.CODES)
    assert codes is not None, "every piece has codes"
    piece = parts.piece(member)
    length = len(piece.cols) if part.role is Role.SMOOTH else len(piece.out)
    dtype = torch.bfloat16 if part.dtype is None else DTYPES[part.dtype]
    return torch.full((length,), part.filled or 0.0, dtype=dtype, device=codes.device)


def _scattered(held: Sequence[Tensor], takes: Sequence[Take], layer: OutgoingLayer) -> Tensor:
    """Rows of all members under each other, each where the reader will take it from."""
    if len(held) == 1 and not takes[0]:
        return held[0]
    if len({part.dtype for part in held}) > 1:
        raise FormatError(f"{layer.name!r} would join tensors of different dtypes")
    whole = torch.cat([_bytes(part) for part in held])
    if any(takes):
        numbers = torch.arange(len(whole))
        rows = torch.cat([numbers[span.as_slice()] for take in takes for span in take])
        whole = torch.empty_like(whole).index_copy_(0, rows, whole)
    return whole.view(held[0].dtype)


def _bytes(part: Tensor) -> Tensor:
    """float8 has no concatenation on every device; its bytes have."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


def _padded(whole: Tensor, role: Role, shape_NK: tuple[int, int], pad: int, piece: Piece) -> Tensor:
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


def _ordered(
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


def _offset(source: Piece, target: Piece, bias: Tensor) -> Tensor:
    """The bias as the target's offsets want it; untouched where both have the same."""
    if source.bias_offsets == target.bias_offsets:
        return bias
    moved = bias.float()
    for piece, sign in ((source, 1.0), (target, -1.0)):
        for offset in piece.bias_offsets:
            moved[offset.rows.as_slice()] += sign * offset.value
    return moved.to(bias.dtype)


def _plain(
    plan: Plan, rows: Sequence[str], parts: _Parts, placed: Mapping[str, Take] | None
) -> Tensor:
    """A tensor that is no layer: its parameters under each other."""
    known = {item.name: item for item in plan.plain}
    held = [_parameter(known[name], parts._weights) for name in rows]
    takes = [() if placed is None else placed[name] for name in rows]
    if len(held) == 1 and not any(takes):
        return held[0]
    return _scattered(held, takes, OutgoingLayer(name=rows[0], members=(), parts=()))


def _parameter(plain: Plain, weights: Weights) -> Tensor:
    """In its own shape; a quantized one is decoded to the dtype it is computed in."""
    taken = [_source(source, plain, weights) for source in plain.sources]
    return (taken[0] if len(taken) == 1 else torch.cat(taken)).reshape(plain.shape)


def _source(source: PlainSource, plain: Plain, weights: Weights) -> Tensor:
    if source.encoding != DENSE:
        return _decoded(source, weights).to(getattr(torch, plain.dtype))
    (part,) = source.parts
    stored = weights.tensor(part.ref.file, part.ref.name)
    cuts = [stored[span.as_slice()] for span in source.take]
    return torch.cat(cuts) if cuts else stored


def _decoded(source: PlainSource, weights: Weights) -> Tensor:
    assert source.stored_NK is not None, "the planner gives every encoded source its shape"
    n, k = source.stored_NK
    if isinstance(weights, _Shapes):
        return torch.empty(n, k, device="meta")
    piece = Piece(
        encoding=source.encoding,
        stored_NK=source.stored_NK,
        parts=source.parts,
        out=Span(0, n),
        cols=Span(0, k),
        take=source.take,
    )
    return decoded(piece, canonical(piece, weights))


# proof -----------------------------------------------------------------------------------------------


def _read_back(plan: Plan, format_name: str, export: Export, tensors: Sequence[_Tensor]) -> Plan:
    """What the dialect's reader makes of the header. Raises FormatError when it is no whole model."""
    dtypes = _dtypes(export)
    header = headers.Header(
        files=(),
        tensors={each.name: each.header(dtypes.get(each.name), 0) for each in tensors},
        metadata=export.metadata,
    )
    checkpoint = Checkpoint(
        origin=f"the {format_name} file to be", root=Path(), files=(), config=export.config or {}
    )
    found, proof = planner.identify(checkpoint, header)
    if format_name not in {found, *FORMATS.load(found).explains}:
        raise FormatError(f"{checkpoint.origin} would be taken for {found}: {proof}")
    drawn = planner.draft(
        checkpoint,
        header,
        config=plan.config,
        format_name=found,
        inventory=_inventory(plan),
    )
    if drawn.problems:
        first = drawn.problems[0]
        raise FormatError(f"{checkpoint.origin} would not be whole: {first.tensor!r} {first.what}")
    return drawn.plan


def _inventory(plan: Plan) -> Inventory:
    """The module's parameters as the plan fills them."""
    shapes: dict[str, tuple[int, ...]] = {item.name: item.shape for item in plan.plain}
    for layer in plan.layers:
        shapes[f"{layer.path}.weight"] = layer.shape_NK
        if any(Role.BIAS in piece.roles for piece in layer.pieces):
            shapes[f"{layer.path}.bias"] = layer.shape_NK[:1]
    return Inventory(shapes=shapes, linears=frozenset(layer.path for layer in plan.layers))


def _losses(plan: Plan, export: Export, read: Plan) -> Iterator[str]:
    """What reads differently. Raises FormatError when weights or what surrounds them would."""
    if read.open:
        raise FormatError(f"the file could not tell its own {read.open[0].topic}")
    if export.lossless is not None:
        yield export.lossless
    back = {layer.path: layer for layer in read.layers}
    changed = [
        (layer.path, one, other)
        for layer in plan.layers
        for one, other in _pairs(layer, back[layer.path], export)
    ]
    inputs = [(path, one, other) for path, one, other in changed if _inputs(one) != _inputs(other)]
    if inputs:
        path, one, other = inputs[0]
        yield (
            f"{len(inputs)} weights change what their inputs become, first {path!r}: "
            f"{_inputs(one)} before, {_inputs(other)} after"
        )
    moved = [path for path, one, other in changed if one.bias_offsets != other.bias_offsets]
    if moved:
        yield f"{len(moved)} biases are rounded once more, first {moved[0]!r}"


def _pairs(one: LayerPlan, other: LayerPlan, export: Export) -> Iterator[tuple[Piece, Piece]]:
    if len(one.pieces) != len(other.pieces):
        raise FormatError(f"{one.path!r} has {len(one.pieces)} pieces, {len(other.pieces)} after")
    filled = {
        member: {part.role for part in layer.parts if part.filled is not None}
        for layer in export.layers
        for member in layer.members
    }
    for index, pair in enumerate(zip(one.pieces, other.pieces, strict=True)):
        before, after = (_meaning(piece) for piece in pair)
        ignored = filled[one.path, index] - pair[0].roles
        for name in before:
            if before[name] != after[name] and not (name == "smooth" and Role.SMOOTH in ignored):
                raise FormatError(
                    f"{one.path!r} has {name} {before[name]}, it would be read as {after[name]}"
                )
        yield pair


def _meaning(piece: Piece) -> dict[str, str]:
    """What must not change for the weights to stay what they are."""
    return {
        "encoding": str(piece.runs_as),
        "smooth": str(piece.smooth),
        "shift": str(piece.shift),
        "rotation": str(piece.rotation),
        "lowrank_input": str(piece.lowrank_input),
        "out": str(piece.out),
        "cols": str(piece.cols),
    }


def _inputs(piece: Piece) -> str:
    activation = piece.activation if piece.recode is None else piece.recode.activation
    return "plain" if activation is None else str(activation)


def _piece(plan: Plan, member: Member) -> Piece:
    return plan.layer(member[0]).pieces[member[1]]


def _require_one(layer: OutgoingLayer, parts: _Parts) -> None:
    """Members of one stored weight share every part that has no rows, unless it is yet to be made."""
    pieces = [parts.piece(member) for member in layer.members]
    if len(pieces) == 1 or any(piece.recode is not None for piece in pieces):
        return
    for part in layer.parts:
        refs = {piece.part(part.role) for piece in pieces}
        if part.role in ROW_ROLES or len(refs) == 1:
            continue
        first, *others = (parts.get(member, part.role) for member in layer.members)
        for (path, _), other in zip(layer.members[1:], others, strict=True):
            same = first is not None and other is not None and torch.equal(first, other)
            if not same:
                raise FormatError(
                    f"{layer.members[0][0]!r} and {path!r} are one weight {layer.name!r} in this "
                    f"dialect, and each has a {part.role} of its own",
                    hint="another --to, which stores them apart",
                )
