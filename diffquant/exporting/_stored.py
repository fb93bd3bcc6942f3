"""The tensors of the file to be: first their shapes, then their bytes when their turn comes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffquant import headers
from diffquant.exporting._arranging import (
    SPELLED,
    Take,
    joined_blocks,
    offset,
    ordered,
    padded,
    scattered,
)
from diffquant.exporting._parts import Member, Parts, Shapes, pieces_of
from diffquant.formats import Export, Outgoing, OutgoingLayer
from diffquant.pieces import plain_value
from diffquant.plan import DENSE, ROW_ROLES, Piece, Plain, Plan, Role
from diffquant.tensors import DTYPES, Weights
from diffquant.writing import Declared


@dataclass(frozen=True, slots=True)
class Sketch:
    """A tensor of the file to be, without data; `dtype` where the writer names one."""

    name: str
    value: Tensor
    dtype: str | None = None

    @property
    def header(self) -> headers.Tensor:
        spelled = self.dtype or SPELLED[self.value.dtype]
        return headers.Tensor(self.name, spelled, tuple(self.value.shape), 0, 0, self.value.nbytes)


def sketches_of(plan: Plan, export: Export, parts: Parts) -> Iterator[Sketch]:
    """Every tensor of the file, rows in the order of the members."""
    for layer in export.layers:
        for part in _present(layer, parts):
            yield Sketch(part.tensor, _stored(layer, part, parts, None), part.dtype)
    for name, rows in export.plain.items():
        yield Sketch(name, _plain(plan, rows, parts, None))
    for name, numbers in export.constants.items():
        yield Sketch(name, torch.tensor(numbers))


def declared(
    plan: Plan, export: Export, parts: Parts, read: Plan, sketches: Sequence[Sketch]
) -> Iterator[Declared]:
    """The same tensors, to be made when their turn comes, rows in the order the reader wants."""
    placed = pieces_of(read)
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


def _present(layer: OutgoingLayer, parts: Parts) -> Iterator[Outgoing]:
    for part in layer.parts:
        if part.filled is not None or any(parts.has(each, part.role) for each in layer.members):
            yield part


def _stored(
    layer: OutgoingLayer,
    part: Outgoing,
    parts: Parts,
    placed: Mapping[Member, Piece] | None,
) -> Tensor:
    """One tensor as the file holds it. `placed` tells how each member will be read."""
    held = [_held(member, part, parts) for member in layer.members]
    if placed is not None and part.role is Role.BIAS:
        held = [
            offset(parts.piece(member), placed[member], bias)
            for member, bias in zip(layer.members, held, strict=True)
        ]
    counts = [len(parts.piece(member).out) for member in layer.members]
    takes = [() if placed is None else placed[member].take for member in layer.members]
    if part.role not in ROW_ROLES or not held[0].dim():
        whole = held[0]
    elif len(held[0]) == counts[0]:
        whole = scattered(held, takes, layer.name)
    else:
        whole = joined_blocks(held, counts, takes, layer.name)
    n = sum(counts)
    first = parts.piece(layer.members[0])
    whole = padded(whole, part.role, (n, len(first.cols)), layer.pad, first)
    return ordered(whole, part, (n, len(first.cols)), layer)


def _held(member: Member, part: Outgoing, parts: Parts) -> Tensor:
    found = parts.get(member, part.role)
    if found is not None:
        return found
    codes = parts.get(member, Role.CODES)
    assert codes is not None, "every piece has codes"
    piece = parts.piece(member)
    length = len(piece.cols) if part.role is Role.SMOOTH else len(piece.out)
    dtype = torch.bfloat16 if part.dtype is None else DTYPES[part.dtype]
    return torch.full((length,), part.filled or 0.0, dtype=dtype, device=codes.device)


def _plain(
    plan: Plan, rows: Sequence[str], parts: Parts, placed: Mapping[str, Take] | None
) -> Tensor:
    """A tensor that is no layer: its parameters under each other."""
    known = {item.name: item for item in plan.plain}
    held = [_parameter(known[name], parts.weights) for name in rows]
    takes = [() if placed is None else placed[name] for name in rows]
    if len(held) == 1 and not any(takes):
        return held[0]
    return scattered(held, takes, rows[0])


def _parameter(plain: Plain, weights: Weights) -> Tensor:
    """In its own shape; a quantized one is decoded to the dtype it is computed in."""
    if all(source.encoding == DENSE for source in plain.sources):
        return plain_value(plain, weights)
    dtype = getattr(torch, plain.dtype)
    if isinstance(weights, Shapes):
        return torch.empty(plain.shape, dtype=dtype, device="meta")
    return plain_value(plain, weights).to(dtype)
