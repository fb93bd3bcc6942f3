"""`--quantization` on a plan: Plan and scheme -> Plan whose layers are quantized while loading.

Only the plan changes here: a dense piece gets a `recode`, which says what it becomes, and the layer
says why. Layers that stay say why too, and the notes count them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from diffquant import patterns, preset
from diffquant.errors import UsageError
from diffquant.families import FAMILIES, Family
from diffquant.plan import DENSE, LayerPlan, Piece, Plan
from diffquant.schemes import SCHEMES, Scheme

#: Values of --quantization-scope.
SCOPES = ("all", "mlp", "attention")
FLAG = "--quantization"
IGNORED_FLAG = "--quantization-ignored-layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """What a person asked for about quantizing one component while loading.

    scheme        a module of `schemes/`
    ignored       patterns of `patterns.hits`
    scope         one of SCOPES
    quantize_all  also layers that the family or a preset calls sensitive
    requantize    also layers that are quantized already
    """

    scheme: str
    ignored: tuple[str, ...] = ()
    scope: str = "all"
    quantize_all: bool = False
    requantize: bool = False


def requantized(plan: Plan, online: Online) -> Plan:
    """The plan with every layer the wish reaches quantized to its scheme.

    Raises UsageError for an ignored pattern that hits no linear, for a scope the family does not
    know, and where no layer is left; PresetError for a preset that does not fit the model.
    """
    scheme, family = SCHEMES.load(online.scheme), FAMILIES.load(plan.family)
    reasons = _reasons(plan, scheme, family, online)
    shared = _siblings(family, [layer.path for layer in plan.layers if layer.path not in reasons])
    layers = tuple(
        _kept(layer, reasons[layer.path])
        if layer.path in reasons
        else _recoded(layer, scheme, online.scheme, shared.get(layer.path))
        for layer in plan.layers
    )
    _require_any(plan, reasons, online)
    return replace(plan, layers=layers, notes=(*plan.notes, *_notes(plan, reasons, online)))


# which layers stay -----------------------------------------------------------------------------


def _reasons(plan: Plan, scheme: Scheme, family: Family, online: Online) -> dict[str, str]:
    """Layer -> why it stays; the first reason counts, what a person typed before what we know."""
    paths = [layer.path for layer in plan.layers]
    found = _ignored(plan, online.ignored)
    for reasons in (
        _out_of_scope(paths, family, plan.family, online.scope),
        {} if online.quantize_all else _sensitive(paths, scheme, family, plan.family),
        dict(_unfit(plan.layers, scheme, online)),
    ):
        found = {**reasons, **found}
    return found


def _ignored(plan: Plan, asked: Sequence[str]) -> dict[str, str]:
    """Typed patterns name layers by module path or by the names the file uses."""
    names = {layer.path: _names(layer) for layer in plan.layers}
    found: dict[str, str] = {}
    for pattern in asked:
        hit = [
            path
            for path, known in names.items()
            if any(patterns.hits(pattern, name) for name in known)
        ]
        if not hit:
            near = patterns.nearest(pattern, names) or tuple(names)[:3]
            raise UsageError(
                f"{IGNORED_FLAG} {pattern} hits no linear layer", hint=f"nearest: {', '.join(near)}"
            )
        for path in hit:
            found.setdefault(path, f"{IGNORED_FLAG} {pattern}")
    return found


def _names(layer: LayerPlan) -> frozenset[str]:
    stored = (part.ref.name.rpartition(".")[0] for piece in layer.pieces for part in piece.parts)
    return frozenset({layer.path, *stored})


def _out_of_scope(
    paths: Sequence[str], family: Family, family_name: str, scope: str
) -> dict[str, str]:
    if scope == "all":
        return {}
    wanted: Mapping[str, Sequence[str]] = {"mlp": family.mlp, "attention": family.attention}
    if scope not in wanted:
        raise UsageError(f"--quantization-scope has no value {scope!r}", hint=f"one of: {SCOPES}")
    if not wanted[scope]:
        raise UsageError(
            f"--quantization-scope {scope}: nothing is known about where the family "
            f"{family_name!r} has its {scope} layers",
            hint=f"{IGNORED_FLAG} leaves layers out by name",
        )
    inside = {path for pattern in wanted[scope] for path in patterns.select(pattern, paths)}
    return {path: f"--quantization-scope {scope}" for path in paths if path not in inside}


def _sensitive(
    paths: Sequence[str], scheme: Scheme, family: Family, family_name: str
) -> dict[str, str]:
    chosen = preset.for_algorithm(family_name, scheme.preset)
    rules = {} if chosen is None else preset.kept(chosen, paths)
    name = "" if chosen is None else chosen.name
    found = {path: f"preset {name}: {rule.reason}" for path, rule in rules.items()}
    for pattern in family.sensitive:
        for path in patterns.select(pattern, paths):
            found.setdefault(path, f"family {family_name}: {pattern} is sensitive")
    return found


def _unfit(
    layers: Iterable[LayerPlan], scheme: Scheme, online: Online
) -> Iterator[tuple[str, str]]:
    """Layers the scheme cannot hold, and encoded ones nobody asked to encode again."""
    for layer in layers:
        odd = next((len(p.cols) for p in layer.pieces if len(p.cols) % scheme.multiple_of_K), None)
        if any(not _is_bare(piece) for piece in layer.pieces):
            yield layer.path, "its input is smoothed, rotated or shifted for the stored weight"
        elif any(piece.encoding != DENSE for piece in layer.pieces) and not online.requantize:
            yield layer.path, "it is quantized already"
        elif odd is not None:
            needed = f"{online.scheme} needs a multiple of {scheme.multiple_of_K}"
            yield layer.path, f"its K is {odd}, {needed}"


def _is_bare(piece: Piece) -> bool:
    """Whether nothing happens to the input before the product, and nothing is added beside it."""
    changed = piece.smooth or piece.rotation or piece.lowrank_input or piece.shift
    return not changed


# what the others become ------------------------------------------------------------------------


def _siblings(family: Family, paths: Sequence[str]) -> dict[str, str]:
    """Layer -> the key it shares with the layers fed by the same input: the first one's path."""
    known = set(paths)
    found: dict[str, str] = {}
    for suffixes in family.siblings:
        stems = {path.removesuffix(suffixes[0]) for path in paths if path.endswith(suffixes[0])}
        for stem in stems:
            members = [stem + suffix for suffix in suffixes if stem + suffix in known]
            found |= dict.fromkeys(members, members[0]) if len(members) > 1 else {}
    return found


def _recoded(layer: LayerPlan, scheme: Scheme, name: str, key: str | None) -> LayerPlan:
    recode = scheme.recode(key)
    lowrank = "raw" if scheme.rank else None
    pieces = tuple(replace(p, recode=recode, lowrank_input=lowrank) for p in layer.pieces)
    twice = [str(piece.encoding) for piece in layer.pieces if piece.encoding != DENSE]
    why = f"{FLAG} {name}" + (f", after {twice[0]}: quantized twice" if twice else "")
    return replace(layer, pieces=pieces, why=why)


def _kept(layer: LayerPlan, reason: str) -> LayerPlan:
    return replace(layer, why=f"{layer.why}; stays: {reason}")


# what is said about it -------------------------------------------------------------------------


def _require_any(plan: Plan, reasons: Mapping[str, str], online: Online) -> None:
    if len(reasons) == len(plan.layers):
        listed = "; ".join(f"{count}: {why}" for why, count in Counter(reasons.values()).items())
        raise UsageError(
            f"{FLAG} {online.scheme} reaches none of {len(plan.layers)} linear layers ({listed})",
            hint="--quantize-all takes sensitive layers too",
        )


def _notes(plan: Plan, reasons: Mapping[str, str], online: Online) -> Iterator[str]:
    """Every reason once, with how many layers it keeps."""
    done = [layer for layer in plan.layers if layer.path not in reasons]
    yield f"{len(done)} layers are quantized to {online.scheme} while loading"
    twice = [layer for layer in done if set(_stored(layer)) != {DENSE.name}]
    if twice:
        yield f"{len(twice)} of them are quantized twice: first {_stored(twice[0])[0]}"
    for why, count in Counter(reasons.values()).items():
        yield f"{count} {'layer stays' if count == 1 else 'layers stay'}: {why}"


def _stored(layer: LayerPlan) -> tuple[str, ...]:
    return tuple(piece.encoding.name for piece in layer.pieces)
