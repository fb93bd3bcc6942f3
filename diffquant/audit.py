"""Is a file whole? Owners, scales and shapes from headers; finite values and sane ranges from weights."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

from diffquant.encodings import ENCODINGS
from diffquant.headers import Header
from diffquant.plan import ROW_MAJOR, LayerPlan, Part, Piece, Plan, Problem, Role

#: Roles whose number of values follows from N and K alone.
PER_ROW = frozenset({Role.CHANNEL_SCALE, Role.BIAS, Role.OUTPUT_SCALE})
SINGLE = frozenset({Role.TENSOR_SCALE, Role.INPUT_SCALE})


def audit(plan: Plan, header: Header, *, deep: bool = False) -> tuple[Problem, ...]:
    """What is wrong with the stored tensors a plan uses: shapes, and values when `deep`."""
    problems = tuple(_shapes(plan, header))
    return problems if problems or not deep else tuple(_values(plan))


def _shapes(plan: Plan, header: Header) -> Iterator[Problem]:
    for layer in plan.layers:
        for piece in layer.pieces:
            for part in piece.parts:
                yield from _shape(layer, piece, part, header)


def _shape(layer: LayerPlan, piece: Piece, part: Part, header: Header) -> Iterator[Problem]:
    n, k = piece.stored_NK
    shape = header.tensors[part.ref.name].shape
    wanted = {role: 1 for role in SINGLE} | {role: n for role in PER_ROW} | {Role.SMOOTH: k}
    count = wanted.get(part.role, _block_scales(piece, part))
    if part.role is Role.BIAS and prod(shape) == max((span.stop for span in piece.take), default=n):
        return  # writers that pad the weight leave the bias as it was
    if count is not None and prod(shape) != count:
        yield Problem(
            part.ref.name, f"has shape {list(shape)}, {layer.path!r} needs {count} values"
        )
    axes = {Role.LOWRANK_DOWN: k, Role.LOWRANK_UP: n}
    if part.role in axes and axes[part.role] not in shape:
        what = f"has shape {list(shape)}, one axis must be {axes[part.role]} for {layer.path!r}"
        yield Problem(part.ref.name, what)


def _block_scales(piece: Piece, part: Part) -> int | None:
    """How many an encoding of fixed groups has; None where the layout pads or the file decides."""
    group = ENCODINGS.load(piece.encoding.name).group
    if part.role is not Role.BLOCK_SCALE or part.layout != ROW_MAJOR or group is None:
        return None
    n, k = piece.stored_NK
    return n * -(-k // int(piece.encoding.option("block", str(group))))


def _values(plan: Plan) -> Iterator[Problem]:
    """Non-finite or negative scales, NaN codes under a scale that is not zero."""
    import torch

    from diffquant.tensors import Weights

    weights = Weights([Path(file.path) for file in plan.files])
    for layer in plan.layers:
        for piece in layer.pieces:
            for part in piece.parts:
                stored = weights.tensor(part.ref.file, part.ref.name)
                if part.role is Role.CODES and ENCODINGS.load(piece.encoding.name).scales_inside:
                    yield from _scales_inside(piece, part, weights)
                if not stored.is_floating_point():
                    continue
                finite = torch.isfinite(stored.float())
                if not finite.all() and not _is_zero_layer(piece, weights):
                    bad = int((~finite).sum())
                    yield Problem(part.ref.name, f"holds {bad} values that are not finite")
                if part.role is Role.TENSOR_SCALE and bool((stored < 0).any()):
                    yield Problem(part.ref.name, "is a negative scale")


def _scales_inside(piece: Piece, part: Part, weights: object) -> Iterator[Problem]:
    """Any bytes are codes; what the scales among them are worth shows in the weight."""
    from diffquant.pieces import canonical, decoded
    from diffquant.tensors import Weights

    assert isinstance(weights, Weights)
    finite = decoded(piece, canonical(piece, weights)).isfinite()
    if bad := int(finite.numel() - finite.sum()):
        yield Problem(part.ref.name, f"decodes to {bad} values that are not finite")


def _is_zero_layer(piece: Piece, weights: object) -> bool:
    """ModelOpt writes an all-zero weight as NaN codes under a zero scale."""
    from diffquant.tensors import Weights

    scale = piece.part(Role.TENSOR_SCALE)
    assert isinstance(weights, Weights)
    return scale is not None and not weights.tensor(scale.ref.file, scale.ref.name).any()
