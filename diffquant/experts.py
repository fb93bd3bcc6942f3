"""Two transformers of one pipeline: the same one twice, or each in the other's place.

Names and shapes of two experts are equal, so only their numbers tell them apart. Norms and other
small parameters stay dense in every quantized file, and are read here straight from the bytes.
"""

import struct
from array import array
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from diffquant import headers, planner
from diffquant.errors import PlanError, UsageError
from diffquant.headers import SMALL, Header
from diffquant.plan import DENSE, Plain, Plan, PlanFile
from diffquant.resolve import RULES, ComponentSource, Fired
from diffquant.sources import Checkpoint

if TYPE_CHECKING:
    Values = array[float]
    Fingerprint = Mapping[str, Values]

SAMPLES = 12  # tensors of a fingerprint
VALUES = 256  # of each
CLEARLY = 4.0  # times closer to the other expert than to its own
SAME = 0.02  # relative difference below which weights are the same but for their rounding


def check(
    components: Mapping[str, ComponentSource], plans: Mapping[str, Plan]
) -> tuple[Fired, ...]:
    """Hold overridden experts against each other and against the base.

    Returns what was found out, as rules. Raises UsageError for one file in both places and for
    experts that are exchanged.
    """
    return tuple(
        fired
        for first, second in combinations(components.values(), 2)
        if first.class_name == second.class_name and (first.override or second.override)
        for fired in _pair(first, second, plans)
    )


def difference(ours: "Fingerprint", theirs: "Fingerprint") -> float | None:
    """Mean relative difference over the tensors both have; None where they share none."""
    shared = [name for name in ours if name in theirs and len(ours[name]) == len(theirs[name])]
    if not shared:
        return None
    return sum(_relative(ours[name], theirs[name]) for name in shared) / len(shared)


def fingerprint(plan: Plan) -> "Fingerprint":
    """Leading values of a few small dense parameters, by their name in the diffusers class.

    Those that are all zero tell nothing and are left out.
    """
    header = headers.read([Path(file.path) for file in plan.files])
    small = [plain for plain in plan.plain if _is_readable(plain, header)]
    chosen = small[:: max(1, len(small) // SAMPLES)][:SAMPLES]
    values = {plain.name: _values(plain, header) for plain in chosen}
    return {name: each for name, each in values.items() if any(each)}


def _pair(
    first: ComponentSource, second: ComponentSource, plans: Mapping[str, Plan]
) -> Iterator[Fired]:
    ours = {each.component: plans[each.component] for each in (first, second)}
    if first.override and second.override:
        _require_two(first, second, ours)
    base = {each.component: _base_plan(each) for each in (first, second)}
    known = {name: fingerprint(plan) for name, plan in base.items() if plan is not None}
    names = {"component": first.component, "other": second.component}
    if len(known) < 2:
        yield Fired("4d", RULES["4d"].format(**names))
        return
    for each, other in ((first, second), (second, first)):
        if each.override:
            yield from _placed(each, other, fingerprint(ours[each.component]), known)


def _require_two(
    first: ComponentSource, second: ComponentSource, plans: Mapping[str, Plan]
) -> None:
    files = [_real(plans[each.component].files) for each in (first, second)]
    apart = None
    if files[0] != files[1]:
        prints = [fingerprint(plans[each.component]) for each in (first, second)]
        apart = difference(*prints)
    if files[0] == files[1] or apart == 0:
        raise UsageError(
            f"{first.component!r} and {second.component!r} were given the same weights: "
            f"{first.weights.origin!r}" + ("" if files[0] == files[1] else " in two copies"),
            hint=f"{_flag(second.component)} names the other expert, or leave it out",
        )


def _placed(
    each: ComponentSource,
    other: ComponentSource,
    print_: "Fingerprint",
    known: "Mapping[str, Fingerprint]",
) -> Iterator[Fired]:
    """Whether one override is nearer to its own expert of the base than to the other."""
    own, foreign = (difference(print_, known[name]) for name in (each.component, other.component))
    if own is None or foreign is None or own == foreign:
        return
    if foreign < SAME and own > CLEARLY * foreign:
        raise UsageError(
            f"{each.component!r} was given the weights of {other.component!r}: "
            f"{each.weights.origin!r} differs from the base's {each.component} by {own:.1%} and "
            f"from its {other.component} by {foreign:.1%}",
            hint=f"exchange {_flag(each.component)} and {_flag(other.component)}",
        )
    if own < SAME:
        names = {"component": each.component, "other": other.component}
        yield Fired("4c", RULES["4c"].format(**names))


def _base_plan(source: ComponentSource) -> Plan | None:
    """The plan of the base's own weights, where they lie here."""
    base: Checkpoint | None = source.base
    if base is None or not base.files:
        return None
    try:
        return planner.plan(base, headers.read(base.files), config=source.config)
    except PlanError:
        return None


def _is_readable(plain: Plain, header: Header) -> bool:
    """One whole dense float tensor of at most 64 KiB, with something in it to compare."""
    if len(plain.sources) != 1:
        return False
    (source,) = plain.sources
    if source.take or source.encoding != DENSE or len(source.parts) != 1:
        return False
    tensor = header.tensors.get(source.parts[0].ref.name)
    return tensor is not None and tensor.dtype in _DECODERS and tensor.nbytes <= SMALL


def _values(plain: Plain, header: Header) -> "Values":
    name = plain.sources[0].parts[0].ref.name
    return _DECODERS[header.tensors[name].dtype](header.read_small(name))[:VALUES]


def _from_float32(stored: bytes) -> "Values":
    return array("f", stored)


def _from_bfloat16(stored: bytes) -> "Values":
    """The upper halves of float32 numbers."""
    wide = bytearray(2 * len(stored))
    wide[2::4], wide[3::4] = stored[0::2], stored[1::2]
    return array("f", bytes(wide))


def _from_float16(stored: bytes) -> "Values":
    return array("f", struct.unpack(f"<{len(stored) // 2}e", stored))


_DECODERS = {"F32": _from_float32, "BF16": _from_bfloat16, "F16": _from_float16}


def _relative(ours: "Values", theirs: "Values") -> float:
    size = sum(map(abs, ours)) + sum(map(abs, theirs))
    apart = sum(abs(mine - other) for mine, other in zip(ours, theirs, strict=True))
    return 2 * apart / size if size else 0.0


def _real(files: tuple[PlanFile, ...]) -> set[Path]:
    return {Path(file.path).resolve() for file in files}


def _flag(component: str) -> str:
    return f"--{component.replace('_', '-')}-path"
