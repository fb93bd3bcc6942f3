"""`diffquant presets`: which layers stay in high precision and what that costs, and what a person
expects of a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import click

from diffquant import patterns, preset, sources
from diffquant.cli import _options, _talk
from diffquant.errors import UsageError
from diffquant.families import FAMILIES, Inventory
from diffquant.forecast import encoded_bytes
from diffquant.preset import Preset
from diffquant.schemes import SCHEMES, Scheme

BF16 = 2  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Layers that one rule keeps, and their weights in bytes: as they stay, and as they would be."""

    pattern: str
    reason: str
    source: str
    layers: int
    kept: int
    quantized: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """All linears of the model quantized one way, in bytes: none kept, with the rules, all kept."""

    scheme: str
    layers: int
    kept: int
    smallest: int
    size: int
    plain: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a preset costs on one model; rules are counted in the first scheme."""

    model: str
    rules: tuple[Kept, ...]
    totals: tuple[Total, ...]


@click.command(short_help="List presets, or show one and what it costs.")
@click.argument("name", required=False)
@click.option("--model", metavar="SOURCE", help="Count on this model, not the published one.")
@_options.JSON
def COMMAND(name: str | None, model: str | None, as_json: bool) -> None:
    """List presets, or show the one called NAME: layers it keeps with the reason and the bytes that
    takes, and defaults. NAME may be a TOML file, or FAMILY-ALGORITHM for the one that serves."""
    if name is None:
        if model is not None:
            raise UsageError(
                "--model needs a preset to count", hint="diffquant presets NAME --model …"
            )
        click.echo(_listed(as_json))
        return
    each = preset.find(name)
    found = cost(each, model)
    if as_json:
        told = {**_json(each), "cost": None if found is None else asdict(found)}
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo(_told(each, found, asked=name))


def cost(each: Preset, model: str | None = None) -> Cost | None:
    """What the preset's rules cost; None without rules, and where nobody described the family.

    model  a source, in the place of the family's published architecture

    Raises PresetError for a rule that keeps no layer of the model, UsageError for another family's.
    """
    schemes = {name: SCHEMES.load(name) for name in _schemes(each)}
    described = each.family in FAMILIES.names() and FAMILIES.load(each.family).is_described
    if not schemes or not described:
        return None
    title, inventory = _architecture(each.family, model)
    shapes = {
        path: (inventory.shapes[f"{path}.weight"][0], prod(inventory.shapes[f"{path}.weight"][1:]))
        for path in inventory.linears
    }
    rules = _rules(each, list(shapes))
    first = next(iter(schemes.values()))
    return Cost(
        model=title,
        rules=tuple(_kept(rule, paths, shapes, first) for rule, paths in rules.items()),
        totals=tuple(_total(name, scheme, rules, shapes) for name, scheme in schemes.items()),
    )


def _schemes(each: Preset) -> Iterator[str]:
    """For every algorithm the preset serves, the scheme of that name or the first that follows it."""
    every = SCHEMES.load_all()
    for algorithm in (*each.algorithms, *_served(each)):
        followers = [name for name, scheme in every.items() if scheme.preset == algorithm]
        yield from [name for name in followers if name == algorithm] or followers[:1]


def _served(each: Preset) -> list[str]:
    """Algorithms for which the family has no rules but these, which are meant for others."""
    asked = sorted({scheme.preset for scheme in SCHEMES.load_all().values()} - set(each.algorithms))
    return [name for name in asked if preset.for_algorithm(each.family, name) == each]


def _architecture(family: str, model: str | None) -> tuple[str, Inventory]:
    """Words for the model, and its parameters."""
    known = FAMILIES.load(family)
    if model is None:
        published = known.class_names[0]
        return f"{published} as published", known.inventory({"_class_name": published})
    config = sources.checkpoint(model).config
    found = config.get("_class_name")
    if found not in known.class_names:
        raise UsageError(
            f"the preset is for {family}, {model!r} is a {found or 'model without a config'}",
            hint="diffquant presets lists those of every family",
        )
    return model, known.inventory(config)


def _rules(each: Preset, paths: Sequence[str]) -> dict[preset.Keep, list[str]]:
    """Rules with the layers they keep: the preset's, then what the family calls sensitive."""
    rules: dict[preset.Keep, list[str]] = {keep: [] for keep in each.keep}
    kept = preset.kept(each, paths)
    for path, rule in kept.items():
        rules[rule].append(path)
    family = FAMILIES.load(each.family)
    for pattern in () if each.complete else family.sensitive:
        more = [path for path in patterns.select(pattern, paths) if path not in kept]
        if more:
            reason = family.reasons.get(pattern, "called sensitive")
            rules[preset.Keep(pattern, reason, f"family {each.family}")] = more
    return rules


def _kept(
    rule: preset.Keep, paths: Sequence[str], shapes: Mapping[str, tuple[int, int]], scheme: Scheme
) -> Kept:
    return Kept(
        pattern=rule.pattern,
        reason=rule.reason,
        source=rule.source,
        layers=len(paths),
        kept=sum(_plain(shapes[path]) for path in paths),
        quantized=sum(_encoded(shapes[path], scheme) for path in paths),
    )


def _total(
    name: str,
    scheme: Scheme,
    rules: Mapping[preset.Keep, Sequence[str]],
    shapes: Mapping[str, tuple[int, int]],
) -> Total:
    stays = {path for paths in rules.values() for path in paths}
    return Total(
        scheme=name,
        layers=len(shapes),
        kept=len(stays),
        smallest=sum(_encoded(shape, scheme) for shape in shapes.values()),
        size=sum(
            _plain(shape) if path in stays else _encoded(shape, scheme)
            for path, shape in shapes.items()
        ),
        plain=sum(_plain(shape) for shape in shapes.values()),
    )


def _plain(shape_NK: tuple[int, int]) -> int:
    return BF16 * shape_NK[0] * shape_NK[1]


def _encoded(shape_NK: tuple[int, int], scheme: Scheme) -> int:
    """Bytes of the quantized weight; a weight that the scheme cannot hold stays as it is."""
    if shape_NK[1] % scheme.multiple_of_K:
        return _plain(shape_NK)
    return encoded_bytes(shape_NK, scheme.recode())


# what is told --------------------------------------------------------------------------------------


def _listed(as_json: bool) -> str:
    presets = [preset.load(each) for each in preset.names()]
    if as_json:
        return json.dumps([_json(each) for each in presets], indent=2)
    return _talk.table((each.name, each.family, _summary(each)) for each in presets)


def _json(each: Preset) -> dict[str, Any]:
    return {
        "name": each.name,
        "family": each.family,
        "algorithms": list(each.algorithms),
        "for_want_of_better": _served(each),
        "models": list(each.models),
        "complete": each.complete,
        "keep": [asdict(keep) for keep in each.keep],
        "defaults": dict(each.defaults),
    }


def _summary(each: Preset) -> str:
    served = _served(each)
    wanting = f"for want of better {', '.join(served)}" if served else ""
    kept = f"keeps {_talk.count(len(each.keep), 'pattern')}" if each.keep else ""
    defaults = ", ".join(f"{key} {value!r}" for key, value in each.defaults.items())
    return "; ".join(text for text in (", ".join(each.algorithms), wanting, kept, defaults) if text)


def _told(each: Preset, found: Cost | None, *, asked: str) -> str:
    served = _served(each)
    facts = [
        ("preset", each.name),
        *_why_this(each, asked),
        ("family", each.family),
        ("algorithms", ", ".join(each.algorithms) or "-"),
        *([("for want of better", ", ".join(served))] if served else []),
        ("models", ", ".join(each.models) or "the whole family"),
        *((key, repr(value)) for key, value in each.defaults.items()),
    ]
    parts = [_talk.facts(facts)]
    if found is not None:
        parts += [_costs(found), _totals(found)]
    elif each.keep:
        kept = [(keep.pattern, f"{keep.reason} ({keep.source})") for keep in each.keep]
        parts += ["keeps\n" + _talk.table(kept)]
        parts += [f"what that costs is not known: nobody described the layers of {each.family}"]
    return "\n\n".join(parts)


def _why_this(each: Preset, asked: str) -> list[tuple[str, str]]:
    """Which algorithm was asked for, where the preset is not called by its own name."""
    algorithm = asked.removeprefix(f"{each.family}-")
    if asked.endswith(".toml") or asked == each.name:
        return []
    if algorithm in each.algorithms:
        return [("asked for", f"{asked}: the rules are meant for {algorithm} too")]
    return [("asked for", f"{asked}: {each.family} has no rules of its own for {algorithm}")]


def _costs(found: Cost) -> str:
    """The rules under their reasons, columns aligned over all of them."""
    rows = [("keeps", "layers", "BF16", f"in {found.totals[0].scheme}")]
    rows += [
        (rule.pattern, str(rule.layers), _talk.size(rule.kept), _talk.size(rule.quantized))
        for rule in found.rules
    ]
    title, *lines = _talk.table(rows).splitlines()
    told = [title.removeprefix("  ").replace("keeps", "keeps  ", 1)]
    because = ""
    for rule, line in zip(found.rules, lines, strict=True):
        if because != (because := f"{rule.reason} ({rule.source})"):
            told.append(because)
        told.append(line)
    return "\n".join(told)


def _totals(found: Cost) -> str:
    first = found.totals[0]
    title = (
        f"{found.model}: {first.kept} of {first.layers} linears stay, all of them are "
        f"{_talk.size(first.plain)} in BF16"
    )
    rows = [("", "with the preset", "it costs", "without")]
    rows += [
        (
            total.scheme,
            _talk.size(total.size),
            _talk.size(total.size - total.smallest),
            _talk.size(total.smallest),
        )
        for total in found.totals
    ]
    return f"{title}\n{_talk.table(rows)}"
