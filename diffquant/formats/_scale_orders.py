"""In which order ModelOpt's block scales lie, as far as their shapes tell.

An exporter may swizzle the scales of every layer into 128 x 4 tiles, pad rows and columns of weight
and scale to 16 (`row_col`), do both, or neither; nothing in the file says which. A scale of [R, C]
for a weight of [N, K] in groups of g is therefore

    rows            R = N           C = K / g
    rows, padded    R = N           C = K / g rounded up to 16
    tiles           R, C at least that, multiples of 128 and 4

Often two of them fit. All layers of a file went through the same export: one layer whose shape has a
single reading answers for the others of its encoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import ge

from diffquant.errors import FormatError
from diffquant.formats import Hints, OpenPart, StoredLayer, StoredPart
from diffquant.headers import Header, Tensor
from diffquant.plan import ROW_MAJOR, Layout, Role

TILES = Layout("tiles_128x4")
PADDED_ROWS = Layout("row_major", (("pad", "crop"),))
#: Encodings whose scales may be swizzled, and columns per scale.
GROUPS = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
WHY = "the header was rewritten after export and the scales' shape fits rows and 128 x 4 tiles"

Layers = tuple[StoredLayer, ...]


def block_scale(scale: Tensor, linear: tuple[int, int], hints: Hints) -> StoredPart:
    """The scale in the order typed, else the first its shape allows.

    Raises FormatError when no order explains the shape.
    """
    found = _orders(scale.shape, linear)
    if hints.scales == "tiles":
        found = tuple(order for order in found if order == TILES)
    if hints.scales == "linear":
        found = tuple(order for order in found if order != TILES)
    if not found:
        said = f" and --scale-layout {hints.scales} was typed" if hints.scales else ""
        raise FormatError(
            f"{scale.name!r} has shape {list(scale.shape)}{said}, its weight needs {list(linear)} "
            "or 128 x 4 tiles of it"
        )
    return StoredPart(Role.BLOCK_SCALE, scale.name, found[0])


def agreed(layers: Layers, header: Header, hints: Hints) -> tuple[Layers, tuple[OpenPart, ...]]:
    """The layers with the order that other layers prove, and what stays open.

    An exporter that swizzles also writes header metadata: without it, and without proof, scales that
    could be rows are rows.
    """
    if hints.scales is not None:
        return layers, ()
    proofs = {name: _proof(layers, header, name) for name in GROUPS}
    told = tuple(
        _relaid(layer) if proofs.get(layer.encoding.name) == {TILES} else layer for layer in layers
    )
    unsure = [layer for layer in layers if len(proofs.get(layer.encoding.name, ())) != 1]
    rewritten = "quantization_config" in header.metadata
    return told, tuple(_open(unsure, header)) if rewritten else ()


def _orders(stored: Sequence[int], linear: tuple[int, int]) -> tuple[Layout, ...]:
    """Every order the shape may be meant in, rows first."""
    if len(stored) != 2:
        return ()
    padded = (linear[0], -(-linear[1] // 16) * 16)
    rows = {padded: PADDED_ROWS, linear: ROW_MAJOR}.get((stored[0], stored[1]))
    tiled = stored[0] % 128 == 0 and stored[1] % 4 == 0 and all(map(ge, stored, linear))
    found = (rows, TILES if tiled else None)
    return tuple(order for order in found if order is not None)


def _of(layer: StoredLayer, header: Header) -> tuple[Layout, ...]:
    """The orders of a layer's block scale; none where it has no such scale."""
    group = GROUPS.get(layer.encoding.name)
    part = next((part for part in layer.parts if part.role is Role.BLOCK_SCALE), None)
    if group is None or part is None:
        return ()
    n, k = layer.stored_NK
    group = int(layer.encoding.option("block", str(group)))
    return _orders(header.tensors[part.tensor].shape, (n, -(-k // group)))


def _proof(layers: Layers, header: Header, encoding: str) -> set[Layout]:
    """Tiles, rows or nothing, by layers whose shape has one reading; both where they contradict."""
    found = (_of(layer, header) for layer in layers if layer.encoding.name == encoding)
    return {TILES if orders == (TILES,) else ROW_MAJOR for orders in found if len(orders) == 1}


def _relaid(layer: StoredLayer) -> StoredLayer:
    parts = (
        replace(part, layout=TILES) if part.role is Role.BLOCK_SCALE else part
        for part in layer.parts
    )
    return replace(layer, parts=tuple(parts))


def _open(layers: Sequence[StoredLayer], header: Header) -> Iterator[OpenPart]:
    """One question per pair of orders."""
    asked: dict[tuple[Layout, ...], list[str]] = {}
    for layer in layers:
        orders = _of(layer, header)
        if len(orders) > 1:
            asked.setdefault(orders, []).append(layer.name)
    for orders, names in asked.items():
        yield OpenPart(
            topic="scale layout",
            role=Role.BLOCK_SCALE,
            layouts=orders,
            layers=tuple(names),
            why=WHY,
        )
