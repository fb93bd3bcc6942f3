"""`--quantization` on a plan: Plan and scheme -> Plan whose layers are quantized while loading.

Only the plan changes here: a dense piece gets a `recode`, which says what it becomes, and the layer
says why. Layers that stay say why too, and the notes count them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from diffquant import patterns, preset
from diffquant.encodings import ENCODINGS
from diffquant.errors import UsageError
from diffquant.families import FAMILIES, Family
from diffquant.formats import FORMATS
from diffquant.plan import DENSE, Activation, LayerPlan, Piece, Plan, Recode, Role
from diffquant.schemes import SCHEMES, Scheme

#: Values of --quantization-scope.
SCOPES = ("all", "mlp", "attention")
FLAG = "--quantization"
IGNORED_FLAG = "--quantization-ignored-layers"
SAVE_FLAG = "--save-quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """What a person asked for about quantizing one component while loading.

    scheme        a module of `schemes/`
    ignored       patterns of `patterns.hits`
    scope         one of SCOPES
    quantize_all  also layers that the family or a preset calls sensitive
    requantize    also layers that are quantized already
    preset        a preset's name or TOML file, in the place of the one the family has
    """

    scheme: str
    ignored: tuple[str, ...] = ()
    scope: str = "all"
    quantize_all: bool = False
    requantize: bool = False
    preset: str | None = None


@dataclass(frozen=True, slots=True)
class Stay:
    """Why a layer is left as it is: the rule, and what is behind it."""

    rule: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.rule} ({self.reason})" if self.reason else self.rule


#: No layers.
NOTHING: Mapping[str, Stay] = {}


def requantized(plan: Plan, online: Online, *, keep: Mapping[str, Stay] = NOTHING) -> Plan:
    """The plan with every layer the wish reaches quantized to its scheme.

    keep  layers that stay whatever the wish says, and why

    Raises UsageError for an ignored pattern that hits no linear, for a scope the family does not
    know, and where no layer is left; PresetError for a preset that does not fit the model.
    """
    scheme, family = SCHEMES.load(online.scheme), FAMILIES.load(plan.family)
    stays = {**_stays(plan, scheme, family, online), **keep}
    done = [layer.path for layer in plan.layers if layer.path not in stays]
    pieces = _pieces(plan, done, scheme, family)
    layers = tuple(
        replace(layer, why=f"{layer.why}; stays: {stays[layer.path].rule}")
        if layer.path in stays
        else _recoded(layer, pieces[layer.path], online.scheme)
        for layer in plan.layers
    )
    _require_any(plan, stays, online)
    return replace(plan, layers=layers, notes=(*plan.notes, *_notes(plan, stays, online)))


def calibrated(plan: Plan, amax: Mapping[str, float]) -> Plan:
    """The requantized plan with static inputs where calibration saw what a layer gets.

    amax  layer -> largest magnitude of its input; layers it lacks, or that saw zeros, stay dynamic

    Raises UsageError when inputs are not quantized by one scale for the whole tensor.
    """
    recodes = {piece.recode for layer in plan.layers for piece in layer.pieces if piece.recode}
    fixed = next((each for each in recodes if not _may_be_static(each.activation)), None)
    if fixed is not None:
        raise UsageError(
            f"calibration has nothing to give: inputs are {fixed.activation or 'not quantized'}",
            hint="leave --calibrate and --calibration out",
        )
    return replace(
        plan, layers=tuple(_static(layer, amax.get(layer.path)) for layer in plan.layers)
    )


def _may_be_static(activation: Activation | None) -> bool:
    """Whether a file can hold the one scale of the input: per tensor, or above its groups."""
    if activation is None or not activation.symmetric:
        return False
    two_levels = {Role.BLOCK_SCALE, Role.TENSOR_SCALE}
    codec = ENCODINGS.load(activation.number.partition(";")[0])
    grouped = any(two_levels <= scales for scales in codec.scales)
    return activation.granularity == "tensor" or (activation.granularity == "group" and grouped)


def _static(layer: LayerPlan, amax: float | None) -> LayerPlan:
    if not amax:
        return layer
    pieces = tuple(
        piece if piece.recode is None else replace(piece, recode=_with_input(piece.recode, amax))
        for piece in layer.pieces
    )
    return replace(layer, pieces=pieces)


def _with_input(recode: Recode, amax: float) -> Recode:
    assert recode.activation is not None, "inputs that are not quantized have no scale"
    return replace(
        recode,
        activation=replace(recode.activation, mode="static"),
        roles=recode.roles | {Role.INPUT_SCALE},
        input_amax=amax,
    )


def require_saveable(wishes: Iterable[Online], output: Path) -> None:
    """Raises UsageError where --save-quantized has nothing to save, no dialect to save it in, or no
    room: an existing folder is never written into."""
    schemes = [wish.scheme for wish in wishes]
    if not schemes:
        raise UsageError(
            f"{SAVE_FLAG} {output} has nothing to save: nothing is quantized while loading",
            hint=f"add {FLAG} NAME, or leave {SAVE_FLAG} out",
        )
    lost = next((name for name in schemes if SCHEMES.load(name).saved_as is None), None)
    if lost is not None:
        raise UsageError(
            f"{SAVE_FLAG}: no dialect stores {lost} as it is made while loading",
            hint=f"{FLAG} one of: {', '.join(saveable())}",
        )
    if output.exists():
        raise UsageError(f"{SAVE_FLAG} {output} exists", hint="name a folder that does not")


def saveable() -> tuple[str, ...]:
    """Schemes whose result can be stored."""
    return tuple(name for name, scheme in SCHEMES.load_all().items() if scheme.saved_as)


# which layers stay -----------------------------------------------------------------------------


def _stays(plan: Plan, scheme: Scheme, family: Family, online: Online) -> dict[str, Stay]:
    """Layer -> why it stays; the first rule counts, what a person typed before what we know."""
    paths = [layer.path for layer in plan.layers]
    found = _ignored(plan, online.ignored)
    for stays in (
        _out_of_scope(paths, family, plan.family, online.scope),
        {}
        if online.quantize_all
        else _sensitive(paths, scheme, family, plan.family, online.preset),
        dict(_unfit(plan.layers, scheme, online)),
    ):
        found = {**stays, **found}
    return found


def _ignored(plan: Plan, asked: Sequence[str]) -> dict[str, Stay]:
    """Typed patterns name layers by module path or by the names the file uses."""
    names = {layer.path: _names(layer) for layer in plan.layers}
    found: dict[str, Stay] = {}
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
            found.setdefault(path, Stay(f"{IGNORED_FLAG} {pattern}"))
    return found


def _names(layer: LayerPlan) -> frozenset[str]:
    stored = (part.ref.name.rpartition(".")[0] for piece in layer.pieces for part in piece.parts)
    return frozenset({layer.path, *stored})


def _out_of_scope(
    paths: Sequence[str], family: Family, family_name: str, scope: str
) -> dict[str, Stay]:
    if scope == "all":
        return {}
    wanted: Mapping[str, Sequence[str]] = {"mlp": family.mlp, "attention": family.attention}
    if scope not in wanted:
        raise UsageError(
            f"--quantization-scope has no value {scope!r}", hint=f"one of: {', '.join(SCOPES)}"
        )
    if not wanted[scope]:
        raise UsageError(
            f"--quantization-scope {scope}: nothing is known about where the family "
            f"{family_name!r} has its {scope} layers",
            hint=f"{IGNORED_FLAG} leaves layers out by name",
        )
    inside = {path for pattern in wanted[scope] for path in patterns.select(pattern, paths)}
    return {path: Stay(f"--quantization-scope {scope}") for path in paths if path not in inside}


def _sensitive(
    paths: Sequence[str], scheme: Scheme, family: Family, family_name: str, asked: str | None
) -> dict[str, Stay]:
    own = preset.for_algorithm(family_name, scheme.preset)
    chosen = own if asked is None else preset.rules_for(family_name, asked)
    rules = {} if chosen is None else preset.kept(chosen, paths)
    name = "" if chosen is None else chosen.name
    found = {path: Stay(f"preset {name}", rule.reason) for path, rule in rules.items()}
    told_all = chosen is not None and chosen.complete
    for pattern in () if told_all else family.sensitive:
        for path in patterns.select(pattern, paths):
            reason = family.reasons.get(pattern, "")
            found.setdefault(path, Stay(f"family {family_name} calls it sensitive", reason))
    return found


def _unfit(
    layers: Iterable[LayerPlan], scheme: Scheme, online: Online
) -> Iterator[tuple[str, Stay]]:
    """Layers the scheme cannot hold, and encoded ones nobody asked to encode again."""
    for layer in layers:
        odd = next((len(p.cols) for p in layer.pieces if len(p.cols) % scheme.multiple_of_K), None)
        if any(not _is_bare(piece) for piece in layer.pieces):
            yield (
                layer.path,
                Stay("its input is smoothed, rotated or shifted for the stored weight"),
            )
        elif any(piece.encoding != DENSE for piece in layer.pieces) and not online.requantize:
            yield layer.path, Stay("it is quantized already")
        elif odd is not None:
            needed = f"{online.scheme} needs a multiple of {scheme.multiple_of_K}"
            yield layer.path, Stay(f"K is {odd}, {needed}")


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


def _pieces(
    plan: Plan, paths: Sequence[str], scheme: Scheme, family: Family
) -> Mapping[str, tuple[Piece, ...]]:
    """What the layers become: in the units of the format they are saved as, or each by itself."""
    known = None if scheme.saved_as is None else FORMATS.load(scheme.saved_as)
    if known is not None and known.quantize and set(known.namings) <= family.namings.keys():
        return known.quantize(plan, frozenset(paths), scheme.recode())
    shared = _siblings(family, paths)
    return {
        path: tuple(
            replace(
                piece,
                recode=scheme.recode(shared.get(path)),
                lowrank_input="raw" if scheme.rank else None,
            )
            for piece in plan.layer(path).pieces
        )
        for path in paths
    }


def _recoded(layer: LayerPlan, pieces: tuple[Piece, ...], name: str) -> LayerPlan:
    twice = [str(piece.encoding) for piece in layer.pieces if piece.encoding != DENSE]
    why = f"{FLAG} {name}" + (f", after {twice[0]}: quantized twice" if twice else "")
    return replace(layer, pieces=pieces, why=why)


# what is said about it -------------------------------------------------------------------------


def _require_any(plan: Plan, stays: Mapping[str, Stay], online: Online) -> None:
    if not plan.layers:
        raise UsageError(
            f"{FLAG} {online.scheme} reaches nothing: this component has no linear layers, only "
            f"{_others(plan) or 'norms'}",
            hint=f"leave {FLAG} out for this component",
        )
    if len(stays) == len(plan.layers):
        listed = "; ".join(f"{count}: {why}" for why, count in Counter(stays.values()).items())
        raise UsageError(
            f"{FLAG} {online.scheme} reaches none of {len(plan.layers)} linear layers ({listed})",
            hint="--quantize-all takes sensitive layers too",
        )


def _notes(plan: Plan, stays: Mapping[str, Stay], online: Online) -> Iterator[str]:
    """Every rule once, with how many layers it keeps."""
    done = [layer for layer in plan.layers if layer.path not in stays]
    yield f"{len(done)} layers are quantized to {online.scheme} while loading"
    yield _share(plan, done)
    twice = [layer for layer in done if set(_stored(layer)) != {DENSE.name}]
    if twice:
        yield f"{len(twice)} of them are quantized twice: first {_stored(twice[0])[0]}"
    for why, count in Counter(stays.values()).items():
        yield f"{count} {'layer stays' if count == 1 else 'layers stay'}: {why}"


def _share(plan: Plan, done: Sequence[LayerPlan]) -> str:
    """How much of all weights the quantized layers are, and what besides linears there is."""
    reached = sum(prod(layer.shape_NK) for layer in done)
    plain = sum(prod(each.shape) for each in plan.plain)
    share = reached / (sum(prod(layer.shape_NK) for layer in plan.layers) + plain)
    others = _others(plan)
    return f"they hold {share:.0%} of its weights" + (f"; {others} stay" if others else "")


def _others(plan: Plan) -> str:
    """`62 convolutions and 2 tables`: weights of more than one dimension that are no linears."""
    kinds = Counter(
        "convolution" if len(each.shape) > 2 else "table"
        for each in plan.plain
        if each.name.endswith(".weight") and len(each.shape) > 1
    )
    return " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())


def _stored(layer: LayerPlan) -> tuple[str, ...]:
    return tuple(piece.encoding.name for piece in layer.pieces)
