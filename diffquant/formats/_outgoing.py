"""From a plan to the tensors of a dialect: what all writers share.

A writer is a table: how it spells each encoding. Here the plan's pieces are gathered under the names
that a naming gives them, several rows of one stored weight where the dialect fuses, and held against
that table. What the table has no word for is refused with the layer and the reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from diffquant.errors import FormatError
from diffquant.families import FAMILIES, Naming, Rule, located, spelled
from diffquant.formats import Export, Outgoing, OutgoingLayer
from diffquant.plan import DENSE, ROW_MAJOR, LayerPlan, Part, Piece, Plan, Role, TensorRef

Member = tuple[str, int]

#: What every dialect spells alike.
BIAS = Outgoing(role=Role.BIAS, tensor="bias")
PLAIN_LINEAR = (Outgoing(role=Role.CODES, tensor="weight"), BIAS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a dialect stores one kind of weight.

    parts          tensors, by what stands behind the layer's name; a role may have several endings
                   only where no layer has two of its parts
    smooth         what smoothing means to the dialect; None: it has none
    lowrank_input  likewise for the low-rank branch
    rotates        whether it can say that a weight is rotated
    pad            N and K are padded to a multiple of it
    """

    parts: tuple[Outgoing, ...]
    smooth: str | None = None
    lowrank_input: str | None = None
    rotates: bool = False
    pad: int = 1

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset(part.role for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A weight to store under one name.

    members  what is stacked in it along N, in stored order
    piece    what all of them are, as the layer runs; parts tell roles, bias if any of them has one
    """

    name: str
    members: tuple[Member, ...]
    piece: Piece


DENSE_SPELLING = Spelling(parts=PLAIN_LINEAR)


def naming_of(plan: Plan, wanted: tuple[str, ...], dialect: str) -> str:
    """The first of the namings that the plan's family has. Raises FormatError when it has none."""
    namings = FAMILIES.load(plan.family).namings
    for name in wanted:
        if name in namings:
            return name
    raise FormatError(
        f"{dialect} spells layers as {' or '.join(map(repr, wanted))}, and family {plan.family!r} "
        "has no such names"
    )


def joined(plan: Plan, naming_name: str, dialect: str) -> tuple[Joined, ...]:
    """Every layer of the plan under the names of the dialect, in the plan's order.

    Raises FormatError where the dialect fuses what the plan stores in different ways, or cuts along
    K what the plan holds whole.
    """
    naming = FAMILIES.load(plan.family).namings[naming_name]
    layers = {layer.path: layer for layer in plan.layers}
    rules: dict[str, tuple[Rule, int]] = {}
    for layer in plan.layers:
        for index, rule in enumerate(_rules(layer, naming, dialect)):
            rules.setdefault(rule.stored, (rule, index))
    return tuple(_joined(rule, index, layers, dialect) for rule, index in rules.values())


def spelled_layer(weight: Joined, spelling: Spelling | None, dialect: str) -> OutgoingLayer:
    """The tensors of one weight. Raises FormatError for what the spelling cannot say."""
    if spelling is None:
        raise FormatError(
            f"{weight.name!r} is {weight.piece.encoding}, which {dialect} cannot store"
        )
    _require_said(weight, spelling, dialect)
    return OutgoingLayer(
        name=weight.name,
        members=weight.members,
        parts=tuple(
            replace(part, tensor=f"{weight.name}.{part.tensor}")
            for part in spelling.parts
            if part.role in weight.piece.roles or part.filled is not None
        ),
        pad=spelling.pad,
    )


def exported(
    plan: Plan,
    layers: tuple[OutgoingLayer, ...],
    naming_name: str,
    *,
    config: Mapping[str, object] | None,
    metadata: Mapping[str, str] | None = None,
    lossless: str | None = None,
) -> Export:
    """The export of those layers and of everything in the plan that is no layer."""
    decoded = [item.name for item in plan.plain if any(s.encoding != DENSE for s in item.sources)]
    losses = [lossless] if lossless else []
    if decoded:
        losses.append(
            f"{len(decoded)} quantized parameters are stored decoded, first {decoded[0]!r}"
        )
    return Export(
        layers=layers,
        plain=dict(_plain(plan, FAMILIES.load(plan.family).namings[naming_name])),
        naming=naming_name,
        config=None if config is None else {**plan.config, **config},
        metadata=metadata or {},
        lossless="; ".join(losses) or None,
    )


def _rules(layer: LayerPlan, naming: Naming, dialect: str) -> list[Rule]:
    """The stored weights that hold the layer, one for each of its pieces."""
    found = [located(naming, name) for name in spelled(naming, layer.path)]
    rules = [rule for rule in found if rule is not None]
    whole = [rule for rule in rules if rule.cols is None]
    slices = sorted((rule for rule in rules if rule.cols is not None), key=lambda r: r.cols or 0)
    if len(layer.pieces) == 1 and whole:
        return whole[:1]
    if len(layer.pieces) == len(slices) and slices:
        return slices
    has = f"{len(slices)} slices along K" if slices else "one weight" if whole else "no name"
    raise FormatError(
        f"{layer.path!r} is stored in {len(layer.pieces)} pieces, {dialect} has {has} for it"
    )


def _joined(rule: Rule, index: int, layers: Mapping[str, LayerPlan], dialect: str) -> Joined:
    absent = [row for row in rule.rows if row not in layers]
    if absent:
        raise FormatError(
            f"{dialect} stores {absent[0]!r} in {rule.stored!r}, the plan has no such layer"
        )
    members = tuple((row, index if rule.cols is not None else 0) for row in rule.rows)
    pieces = [running(layers[path].pieces[at]) for path, at in members]
    for (path, _), piece in zip(members, pieces, strict=True):
        if _kind(piece) != _kind(pieces[0]):
            raise FormatError(
                f"{dialect} stores {members[0][0]!r} and {path!r} as one weight {rule.stored!r}; they are "
                f"{_told(pieces[0])} and {_told(piece)}",
                hint=f"quantize or keep them together: {', '.join(sorted(set(rule.rows)))}",
            )
    roles = frozenset[Role]().union(*(piece.roles for piece in pieces))
    parts = tuple(part for piece in pieces for part in piece.parts)
    one_each = {role: next(part for part in parts if part.role is role) for role in sorted(roles)}
    return Joined(
        name=rule.stored,
        members=members,
        piece=replace(pieces[0], parts=tuple(one_each.values())),
    )


def running(piece: Piece) -> Piece:
    """The piece as it multiplies: what its recode makes of it, where it has one."""
    recode = piece.recode
    if recode is None:
        return piece
    codes = piece.part(Role.CODES)
    ref = TensorRef(0, "") if codes is None else codes.ref
    kept = tuple(
        part for part in piece.parts if part.role is Role.BIAS and Role.BIAS not in recode.roles
    )
    made = tuple(Part(role, ref, ROW_MAJOR) for role in sorted(recode.roles))
    return replace(
        piece,
        encoding=recode.encoding,
        activation=recode.activation,
        parts=(*made, *kept),
        recode=None,
    )


def _kind(piece: Piece) -> tuple[object, ...]:
    """What pieces of one stored weight must have in common."""
    return (
        piece.encoding,
        piece.activation,
        piece.smooth,
        piece.rotation,
        piece.lowrank_input,
        piece.shift,
        piece.roles - {Role.BIAS},
    )


def _told(piece: Piece) -> str:
    others = sorted(piece.roles - {Role.CODES, Role.BIAS})
    activation = f", inputs {piece.activation}" if piece.activation else ""
    return f"{piece.encoding}{activation} ({', '.join(others) or 'no scales'})"


def _require_said(weight: Joined, spelling: Spelling, dialect: str) -> None:
    """Every part has an ending, and smoothing, low rank and rotation mean what the plan means."""
    piece = weight.piece
    unsaid = sorted(piece.roles - spelling.roles)
    reasons = [f"has a {role}, for which {dialect} has no place" for role in unsaid]
    if piece.smooth not in (None, spelling.smooth):
        reasons.append(f"has smoothing to {piece.smooth} by, {dialect} means {spelling.smooth}")
    if piece.lowrank_input not in (None, spelling.lowrank_input):
        reasons.append(
            f"has a low-rank branch of the {piece.lowrank_input} input, {dialect} of the "
            f"{spelling.lowrank_input}"
        )
    if piece.rotation is not None and not spelling.rotates:
        reasons.append(f"is rotated, which {dialect} cannot say")
    if reasons:
        raise FormatError(f"{weight.name!r} ({piece.encoding}) {reasons[0]}")


def _plain(plan: Plan, naming: Naming) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Stored tensor -> the parameters stacked in it, in stored order."""
    known = {item.name for item in plan.plain}
    written: set[str] = set()
    for item in plan.plain:
        if item.name in written:
            continue
        name = next(iter(spelled(naming, item.name)), None)
        if name is None:
            raise FormatError(f"the naming has no name for the parameter {item.name!r}")
        rows = _rows(naming, name, item.name)
        absent = [row for row in rows if row not in known]
        if absent:
            raise FormatError(
                f"{absent[0]!r} is stored in {name!r}, the plan has no such parameter"
            )
        written.update(rows)
        yield name, rows


def _rows(naming: Naming, stored: str, parameter: str) -> tuple[str, ...]:
    """The parameters a stored tensor holds; rules speak of modules or of whole names."""
    rule = located(naming, stored)
    if rule is not None and parameter in rule.rows:
        return rule.rows
    stem, _, leaf = stored.rpartition(".")
    rule = located(naming, stem)
    return (parameter,) if rule is None else tuple(f"{row}.{leaf}" for row in rule.rows)
