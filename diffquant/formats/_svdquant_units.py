"""A dense plan's layers -> pieces in the units that Nunchaku stores.

    q, k and v              one weight: one low-rank input side, one smoothing; in nvfp4 an outer scale
                            for each, stored per row
    proj_out of FLUX.1      two weights side by side along K, each with a branch of its own; the bias
                            lies beside the second, zeros beside the first
    int4 behind GELU        input shifted by 0.171875 and unsigned; the bias makes up for the shift
    modulation              AWQ: 16-bit inputs, 4-bit weight in groups of 64

A weight in files fused otherwise still works; what Nunchaku could not store is for its writer to say.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from diffquant.families import FAMILIES, Family, Naming, Rule, located, spelled
from diffquant.formats._svdquant import AWQ_GROUP, GELU_SHIFT, INT4
from diffquant.patterns import matches
from diffquant.plan import BiasOffset, Encoding, LayerPlan, Part, Piece, Plan, Recode, Role, Span

AWQ_ENCODING = Encoding(
    "int4", (("group", str(AWQ_GROUP)), ("signed", "false"), ("zero", "scaled"))
)
AWQ_RECODE = Recode(
    encoding=AWQ_ENCODING,
    granularity="group",
    group=AWQ_GROUP,
    activation=None,
    roles=frozenset({Role.CODES, Role.BLOCK_SCALE, Role.ZERO_POINT}),
    scale_dtype="bfloat16",
)


def units(
    plan: Plan, paths: frozenset[str], recode: Recode, naming_name: str
) -> Mapping[str, tuple[Piece, ...]]:
    """The pieces of every layer in `paths`."""
    family = FAMILIES.load(plan.family)
    naming = family.namings[naming_name]
    made: dict[str, tuple[Piece, ...]] = {}
    for layer in (layer for layer in plan.layers if layer.path in paths):
        chunks = [each for pattern, each in family.chunked.items() if matches(pattern, layer.path)]
        if chunks:
            made[layer.path] = tuple(_modulation(piece, *chunks[0]) for piece in layer.pieces)
        else:
            made[layer.path] = tuple(
                _unit(piece, layer, rule, recode, family)
                for piece, rule in _cut(layer, naming, family, plan)
            )
    return made


def _modulation(piece: Piece, count: int, scales: tuple[int, ...]) -> Piece:
    """Chunks that are scales have 1 added to their bias in the file."""
    size = len(piece.out) // count
    offsets = (BiasOffset(Span(chunk * size, (chunk + 1) * size), -1.0) for chunk in scales)
    made = AWQ_RECODE.roles | (piece.roles & {Role.BIAS})
    recode = replace(AWQ_RECODE, roles=made, bias_offsets=tuple(offsets))
    return replace(piece, recode=recode)


def _cut(
    layer: LayerPlan, naming: Naming, family: Family, plan: Plan
) -> Iterator[tuple[Piece, Rule]]:
    """The layer's pieces, each with the stored weight it belongs to."""
    found = [located(naming, name) for name in spelled(naming, layer.path)]
    rules = [rule for rule in found if rule is not None]
    slices = sorted((rule for rule in rules if rule.cols is not None), key=lambda r: r.cols or 0)
    whole = [rule for rule in rules if rule.cols is None] or [Rule(layer.path, (layer.path,))]
    if not slices:
        yield from ((piece, whole[0]) for piece in layer.pieces)
    elif len(layer.pieces) > 1:
        yield from zip(layer.pieces, slices, strict=True)
    else:
        (piece,) = layer.pieces
        start = 0
        for rule, width in zip(slices, _widths(layer, family, plan), strict=True):
            yield replace(piece, cols=Span(start, start + width), skip=piece.skip + start), rule
            start += width


def _widths(layer: LayerPlan, family: Family, plan: Plan) -> tuple[int, ...]:
    """Columns of each slice: as many as the layers give whose outputs lie there."""
    feeding = next(
        names for pattern, names in family.joined.items() if matches(pattern, layer.path)
    )
    stem = layer.path.rpartition(".")[0]
    return tuple(plan.layer(f"{stem}.{name}").shape_NK[0] for name in feeding)


def _unit(
    piece: Piece,
    layer: LayerPlan,
    rule: Rule,
    recode: Recode,
    family: Family,
) -> Piece:
    fused = rule.stored if len(rule.rows) > 1 and len(layer.pieces) == 1 else None
    shift = GELU_SHIFT if recode.encoding == INT4.encoding and _behind_gelu(rule, family) else 0.0
    has_bias = any(Role.BIAS in each.roles for each in layer.pieces)
    activation = recode.activation
    if shift and activation is not None:
        activation = replace(activation, unsigned=True)
    roles = recode.roles
    if fused is not None and Role.TENSOR_SCALE in roles:
        roles = (roles - {Role.TENSOR_SCALE}) | {Role.CHANNEL_SCALE}
    roles |= {Role.BIAS} if has_bias or shift else set()
    return replace(
        piece,
        parts=_without_bias(piece) if rule.cols == 0 else piece.parts,
        shift=shift,
        lowrank_input="raw",
        recode=replace(
            recode,
            activation=activation,
            roles=frozenset(roles),
            fused=fused,
        ),
    )


def _without_bias(piece: Piece) -> tuple[Part, ...]:
    """The bias of a layer that is cut along K lies beside its last slice."""
    return tuple(part for part in piece.parts if part.role is not Role.BIAS)


def _behind_gelu(rule: Rule, family: Family) -> bool:
    """Whether GELU feeds the stored weight."""
    key = rule.rows[0] if rule.cols is None else f"{rule.rows[0]}:{rule.cols}"
    return any("gelu" in kind and matches(each, key) for each, kind in family.fed_by.items())
