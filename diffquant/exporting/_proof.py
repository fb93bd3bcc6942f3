"""What the dialect's own reader makes of the file to be, held against the plan that came in."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from diffquant import headers, planner
from diffquant.errors import FormatError
from diffquant.exporting._parts import Parts, pieces_of
from diffquant.exporting._stored import Sketch
from diffquant.formats import FORMATS, Export, OutgoingLayer
from diffquant.plan import ROW_ROLES, BiasOffset, Piece, Plan, Role
from diffquant.sources import Checkpoint


def read_back(plan: Plan, format_name: str, export: Export, sketches: Sequence[Sketch]) -> Plan:
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


def losses_of(plan: Plan, export: Export, read: Plan) -> Iterator[str]:
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
    before, after = pieces_of(plan), pieces_of(read)
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


def require_one(layer: OutgoingLayer, parts: Parts) -> None:
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
