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
from diffquant.formats import FORMATS, Export, Outgoing, OutgoingLayer
from diffquant.layouts import LAYOUTS
from diffquant.pieces import canonical, plain_value
from diffquant.plan import (
    DENSE,
    ROW_ROLES,
    BiasOffset,
    Piece,
    Plain,
    Plan,
    Recode,
    Role,
    Span,
)
from diffquant.recode import Encoder, sketched
from diffquant.sources import Checkpoint
from diffquant.tensors import DTYPES, Passing, Weights
from diffquant.writing import GIB, Check, Declared, Progress, write, write_file

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
    weights = Passing([Path(file.path) for file in plan.files])
    shapes = _Parts(plan, _Shapes(weights))
    sketches = tuple(_sketches(plan, export, shapes))
    read = _read_back(plan, format_name, export, sketches)
    losses = tuple(_losses(plan, export, read))
    parts = _Parts(plan, weights)
    for layer in export.layers:
        _require_one(layer, parts)
    return Prepared(
        format=format_name,
        export=export,
        tensors=tuple(_declared(plan, export, parts, read, sketches)),
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
    check: Check | None = None,
    on_progress: Progress | None = None,
) -> tuple[Path, ...]:
    """Write what was prepared: a component folder, or one file where the dialect is one.

    check  called with the files before they get their names; what it raises removes them

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
        path = write_file(
            output,
            prepared.tensors,
            origin=origin,
            metadata=metadata,
            overwrite=overwrite,
            check=check,
            on_progress=on_progress,
        )
        return (path,)
    done = write(
        output,
        prepared.tensors,
        origin=origin,
        config=export.config,
        metadata=export.metadata,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        check=check,
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


def _pieces(plan: Plan) -> dict[Member, Piece]:
    return {
        (layer.path, index): piece
        for layer in plan.layers
        for index, piece in enumerate(layer.pieces)
    }


class _Parts:
    """Canonical parts of a plan's pieces. A recoded piece is encoded once, while its parts are asked
    for in a row."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self.weights = weights
        self._encoder = Encoder(plan, weights)
        self._pieces = _pieces(plan)
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
        if piece.recode is not None and role in piece.recode.roles:
            return self._made(member, piece)[role]
        alone = replace(piece, parts=tuple(part for part in piece.parts if part.role is role))
        if role is Role.BLOCK_SCALE and piece.take:
            self._require_rows(member, alone)
        return canonical(alone, self.weights)[role]

    def share(self, one: Member, other: Member, role: Role) -> bool:
        """Whether both pieces have the same part; of parts yet to be made, whether they will."""
        recodes = [self.piece(member).recode for member in (one, other)]
        if any(recode is not None and role in recode.roles for recode in recodes):
            keys = {None if recode is None else _shared(recode, role) for recode in recodes}
            return len(keys) == 1 and None not in keys
        if self.piece(one).part(role) == self.piece(other).part(role):
            return True
        first, second = self.get(one, role), self.get(other, role)
        return first is not None and second is not None and torch.equal(first, second)

    def _made(self, member: Member, piece: Piece) -> dict[Role, Tensor]:
        if member not in self._encoded:
            if isinstance(self.weights, _Shapes):
                made = sketched(piece)
            else:
                made = self._encoder.parts(piece, canonical(piece, self.weights))
            self._encoded = {member: made}
        return self._encoded[member]

    def _require_rows(self, member: Member, alone: Piece) -> None:
        """Blocks of rows cannot be cut between their rows."""
        whole = canonical(replace(alone, take=()), self.weights)[Role.BLOCK_SCALE]
        if whole.shape[0] != alone.stored_NK[0]:
            raise FormatError(
                f"{member[0]!r} is cut from a weight in blocks of "
                f"{alone.stored_NK[0] // whole.shape[0]} rows, which cannot be stored alone"
            )


def _shared(recode: Recode, role: Role) -> str | None:
    """The key of what makes a part that has no rows; siblings with one key have one such part."""
    keys = {Role.TENSOR_SCALE: recode.shared_amax, Role.INPUT_SCALE: str(recode.input_amax)}
    return keys.get(role, recode.fused)


# stored tensors --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sketch:
    """A tensor of the file to be, without data; `dtype` where the writer names one."""

    name: str
    value: Tensor
    dtype: str | None = None

    @property
    def header(self) -> headers.Tensor:
        spelled = self.dtype or SPELLED[self.value.dtype]
        return headers.Tensor(self.name, spelled, tuple(self.value.shape), 0, 0, self.value.nbytes)


def _sketches(plan: Plan, export: Export, parts: _Parts) -> Iterator[_Sketch]:
    """Every tensor of the file, rows in the order of the members."""
    for layer in export.layers:
        for part in _present(layer, parts):
            yield _Sketch(part.tensor, _stored(layer, part, parts, None), part.dtype)
    for name, rows in export.plain.items():
        yield _Sketch(name, _plain(plan, rows, parts, None))
    for name, numbers in export.constants.items():
        yield _Sketch(name, torch.tensor(numbers))


def _declared(
    plan: Plan, export: Export, parts: _Parts, read: Plan, sketches: Sequence[_Sketch]
) -> Iterator[Declared]:
    """The same tensors, to be made when their turn comes, rows in the order the reader wants."""
    placed = _pieces(read)
    plain = {item.name: item.sources[0].take for item in read.plain}
    makers: dict[str, Any] = {
        part.tensor: partial(_stored, layer, part, parts, placed)
        for layer in export.layers
        for part in layer.parts
    }
    makers |= {
        name: partial(_plain, plan, rows, parts, plain) for name, rows in export.plain.items()
    }
    makers |= {name: partial(torch.tensor, numbers) for name, numbers in export.constants.items()}
    for sketch in sketches:
        header = sketch.header
        yield Declared(header.name, header.dtype, header.shape, makers[header.name])


def _present(layer: OutgoingLayer, parts: _Parts) -> Iterator[Outgoing]:
    for part in layer.parts:
        if part.filled is not None or any(parts.has(each, part.role) for each in layer.members):
            yield part


def _stored(
    layer: OutgoingLayer,
    part: Outgoing,
    parts: _Parts,
    placed: Mapping[Member, Piece] | None,
) -> Tensor:
    """One tensor as the file holds it. `placed` tells how each member will be read."""
    held = [_held(member, part, parts) for member in layer.members]
    if placed is not None and part.role is Role.BIAS:
        held = [
            _offset(parts.piece(member), placed[member], bias)
            for member, bias in zip(layer.members, held, strict=True)
        ]
    counts = [len(parts.piece(member).out) for member in layer.members]
    takes = [() if placed is None else placed[member].take for member in layer.members]
    if part.role not in ROW_ROLES or not held[0].dim():
        whole = held[0]
    elif len(held[0]) == counts[0]:
        whole = _scattered(held, takes, layer.name)
    else:
        whole = _blocks(held, counts, takes, layer.name)
    n = sum(counts)
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


def _scattered(held: Sequence[Tensor], takes: Sequence[Take], name: str) -> Tensor:
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


def _blocks(
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
    held = [_parameter(known[name], parts.weights) for name in rows]
    takes = [() if placed is None else placed[name] for name in rows]
    if len(held) == 1 and not any(takes):
        return held[0]
    return _scattered(held, takes, rows[0])


def _parameter(plain: Plain, weights: Weights) -> Tensor:
    """In its own shape; a quantized one is decoded to the dtype it is computed in."""
    if all(source.encoding == DENSE for source in plain.sources):
        return plain_value(plain, weights)
    dtype = getattr(torch, plain.dtype)
    if isinstance(weights, _Shapes):
        return torch.empty(plain.shape, dtype=dtype, device="meta")
    return plain_value(plain, weights).to(dtype)


# proof -----------------------------------------------------------------------------------------------


def _read_back(plan: Plan, format_name: str, export: Export, sketches: Sequence[_Sketch]) -> Plan:
    """What the dialect's reader makes of the header. Raises FormatError when it is no whole model."""
    header = headers.Header(
        files=(),
        tensors={sketch.name: sketch.header for sketch in sketches},
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
        inventory=planner.inventory_of(plan),
    )
    if drawn.problems:
        first = drawn.problems[0]
        raise FormatError(f"{checkpoint.origin} would not be whole: {first.tensor!r} {first.what}")
    return drawn.plan


def _losses(plan: Plan, export: Export, read: Plan) -> Iterator[str]:
    """What reads differently. Raises FormatError when weights or what surrounds them would."""
    if read.open:
        raise FormatError(f"the file could not tell its own {read.open[0].topic}")
    if export.lossless is not None:
        yield export.lossless
    pairs = list(_pairs(plan, export, read))
    inputs = [(path, one, other) for path, one, other in pairs if _inputs(one) != _inputs(other)]
    if inputs:
        path, one, other = inputs[0]
        yield (
            f"what inputs become changes in {len(inputs)} of {len(pairs)} weights, first {path!r}: "
            f"{_inputs(one)} before, {_inputs(other)} after"
        )
    moved = [path for path, one, other in pairs if _offsets(one) != other.bias_offsets]
    if moved:
        yield f"the biases of {len(moved)} weights are rounded once more, first {moved[0]!r}"


def _pairs(plan: Plan, export: Export, read: Plan) -> Iterator[tuple[str, Piece, Piece]]:
    """Every piece before and after, which mean the same but for their inputs."""
    before, after = _pieces(plan), _pieces(read)
    for layer in export.layers:
        filled = {part.role for part in layer.parts if part.filled is not None}
        for member in layer.members:
            one, other = before[member], after[member]
            wanted, found = _meaning(one), _meaning(other)
            if Role.SMOOTH in filled - one.roles:
                wanted["smooth"] = found["smooth"]
            for name in wanted:
                if wanted[name] != found[name]:
                    raise FormatError(
                        f"{member[0]!r} has {name} {wanted[name]}, it would be read as {found[name]}"
                    )
            yield member[0], one, other


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


def _offsets(piece: Piece) -> tuple[BiasOffset, ...]:
    """Those the bias was rounded with."""
    return piece.bias_offsets if piece.recode is None else piece.recode.bias_offsets


def _inputs(piece: Piece) -> str:
    activation = piece.activation if piece.recode is None else piece.recode.activation
    return "plain" if activation is None else str(activation)


def _require_one(layer: OutgoingLayer, parts: _Parts) -> None:
    """Members of one stored weight share every part that has no rows."""
    for part in layer.parts:
        if part.role in ROW_ROLES or len(layer.members) == 1:
            continue
        first, *others = layer.members
        for other in others:
            if not parts.share(first, other, part.role):
                raise FormatError(
                    f"{first[0]!r} and {other[0]!r} are one weight {layer.name!r} in this dialect, "
                    f"and each has a {part.role} of its own",
                    hint="a dialect that stores them apart, such as --to modelopt",
                )
