"""TOML -> Preset: which layers stay in high precision, with the evidence; what a person expects.

A preset is a file of `presets/`, its stem the name. Every file has the same shape:

    family = "flux1"                       a family of diffquant.families
    algorithms = ["fp8", "int8"]           what the `keep` tables are meant for; may be empty
    models = ["org/repo"]                  models the file speaks of; empty means the whole family
    complete = true                        layers the family calls sensitive stay only if kept here

    [[keep]]                               layers that stay as they are
    patterns = ["blocks.*.norm.linear"]    see diffquant.patterns.select
    reason = "…"                           one line
    source = "…"                           who found out

    [defaults]                             what a run uses when nothing was typed
    num_inference_steps = 28

An algorithm is a value of --quantization (fp8, nvfp4 …), or the name of an exported form whose
makers already chose layers (modelopt_fp8, modelopt_nvfp4). A family needs no file for each of them:
a file may be meant for several, and where a family has none, the rules of the nearest algorithm
serve. Either way `FAMILY-ALGORITHM` is a name for them.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffquant import patterns
from diffquant.errors import PresetError, UsageError, meant

Default = int | float | str

#: Arguments of a pipeline call that a preset may set, and their types. Sizes are pixels.
DEFAULTS: Mapping[str, type] = {
    "num_inference_steps": int,
    "guidance_scale": float,
    "guidance_scale_2": float,
    "true_cfg_scale": float,
    "negative_prompt": str,
    "height": int,
    "width": int,
    "num_frames": int,
    "fps": int,
    "max_sequence_length": int,
}


#: Algorithm -> the one whose rules serve where a family has none: as many bits first, then more.
#: What exporters chose falls back to nothing.
NEAREST: Mapping[str, str] = {
    "svdq": "nvfp4",
    "mxfp4": "nvfp4",
    "int4": "nvfp4",
    "nvfp4": "fp8",
    "mxfp8": "fp8",
    "int8": "fp8",
}

#: What a file may hold.
KEYS = frozenset({"family", "algorithms", "models", "complete", "keep", "defaults"})


@dataclass(frozen=True, slots=True)
class Keep:
    """Layers that stay in high precision: which, why, and who found out."""

    pattern: str
    reason: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One file of `presets/`; see the module's docstring."""

    name: str
    family: str
    algorithms: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    complete: bool = False
    keep: tuple[Keep, ...] = ()
    defaults: Mapping[str, Default] = field(default_factory=dict)


def names() -> tuple[str, ...]:
    """Names of all presets in alphabetical order."""
    found = (path.name for path in files("diffquant.presets").iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml")))


@cache
def load(name: str) -> Preset:
    """The preset of that name, or the one that serves where `FAMILY-ALGORITHM` has no file: its own
    name says which. Raises UsageError when there is none, PresetError for a bad one."""
    if name in names():
        text = files("diffquant.presets").joinpath(f"{name}.toml").read_text("utf-8")
        return parse(name, text)
    family, _, algorithm = name.partition("-")
    if (serving := for_algorithm(family, algorithm)) is not None:
        return serving
    raise UsageError(f"no preset is called {name!r}", hint=meant(name, names()))


def find(name: str) -> Preset:
    """The preset of that name, or that of a TOML file. Raises as `load` and `parse` do."""
    if not name.endswith(".toml"):
        return load(name)
    path = Path(name)
    if not path.is_file():
        raise PresetError(f"no file {name!r}", hint=f"or a name: {', '.join(names())}")
    return parse(path.stem, path.read_text("utf-8"))


def rules_for(family: str, name: str) -> Preset:
    """What `find` finds, for a model of that family. Raises PresetError for rules of another family,
    and for a preset that has defaults alone."""
    found = find(name)
    own = [each for each in map(load, names()) if each.family == family and each.keep]
    hint = f"those of {family}: {', '.join(each.name for each in own) or 'none'}"
    if found.family != family:
        raise PresetError(
            f"preset {name!r} is for {found.family}, the model is {family}", hint=hint
        )
    if not found.keep:
        raise PresetError(f"preset {name!r} keeps no layer, it has defaults", hint=hint)
    return found


def parse(name: str, text: str) -> Preset:
    """The preset a TOML text spells. Raises PresetError naming the file and the key at fault."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"preset {name}.toml is no TOML: {error}") from error
    reader = _Reader(name)
    reader.only(table, "", KEYS)
    return Preset(
        name=name,
        family=reader.take(table, "family", str),
        algorithms=reader.strings(table, "algorithms"),
        models=reader.strings(table, "models"),
        complete="complete" in table and reader.take(table, "complete", bool),
        keep=tuple(keep for rule in table.get("keep", ()) for keep in reader.keeps(rule)),
        defaults=reader.defaults(table.get("defaults", {})),
    )


def for_algorithm(family: str, algorithm: str) -> Preset | None:
    """The preset with the layers to keep for a family and an algorithm, or for the nearest one that
    the family has rules for; None when it has none at all."""
    presets = [load(name) for name in names()]
    wanted: str | None = algorithm
    while wanted is not None:
        found = (each for each in presets if each.family == family and wanted in each.algorithms)
        if (own := next(found, None)) is not None:
            return own
        wanted = NEAREST.get(wanted)
    return None


def for_model(*known_as: str) -> Preset | None:
    """The preset with the defaults of a model, by any of the names it is known as.

    Names are sources as typed, `--model-id` values or local directories; the first that some
    preset lists decides. The organization and the case of letters do not matter, and the hub's
    cache directories are understood.
    """
    presets = [load(name) for name in names()]
    for name in known_as:
        spellings = _spellings(name)
        for preset in presets:
            if any(_short(model) in spellings for model in preset.models):
                return preset
    return None


def kept(preset: Preset, paths: Sequence[str]) -> dict[str, Keep]:
    """The layers among `paths` that stay, each with its first rule, in the order of the paths.

    Raises PresetError when a pattern names none of them: a preset that protects nothing is wrong
    for this model, and silence would quantize what it was written to save.
    """
    rules: dict[str, Keep] = {}
    for keep in preset.keep:
        chosen = patterns.select(keep.pattern, paths)
        if not chosen:
            raise PresetError(
                f"preset {preset.name!r} keeps {keep.pattern!r}, which no layer of the model is",
                hint=f"nearest: {', '.join(patterns.nearest(keep.pattern, paths)) or 'none'}",
            )
        for path in chosen:
            rules.setdefault(path, keep)
    return {path: rules[path] for path in paths if path in rules}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes typed values out of the tables of one file, or says which key is at fault."""

    name: str

    def fault(self, what: str, hint: str | None = None) -> PresetError:
        return PresetError(f"preset {self.name}.toml: {what}", hint=hint)

    def only(self, table: Mapping[str, Any], where: str, known: frozenset[str]) -> None:
        unknown = sorted(set(table) - known)
        if unknown:
            raise self.fault(
                f"unknown key {(where + unknown[0])!r}", hint=f"known: {', '.join(sorted(known))}"
            )

    def take(self, table: Mapping[str, Any], key: str, kind: type) -> Any:
        value = table.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.fault(f"{key!r} is {value!r}, {kind.__name__} was needed")
        return value

    def strings(self, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        values = table.get(key, [])
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            raise self.fault(f"{key!r} is {values!r}, a list of strings was needed")
        return tuple(values)

    def keeps(self, rule: Mapping[str, Any]) -> tuple[Keep, ...]:
        self.only(rule, "keep.", frozenset({"patterns", "reason", "source"}))
        reason, source = (self.take(rule, key, str) for key in ("reason", "source"))
        return tuple(Keep(pattern, reason, source) for pattern in self.strings(rule, "patterns"))

    def defaults(self, table: Mapping[str, Any]) -> dict[str, Default]:
        self.only(table, "defaults.", frozenset(DEFAULTS))
        return {key: self.take(table, key, DEFAULTS[key]) for key in table}


def _short(model: str) -> str:
    return model.rpartition("/")[2].casefold()


def _spellings(name: str) -> frozenset[str]:
    """Every short name a source may stand for: its last segment, or a hub cache directory's model."""
    segments = name.partition("@")[0].replace("\\", "/").rstrip("/").casefold().split("/")
    cached = (each.rpartition("--")[2] for each in segments if each.startswith("models--"))
    return frozenset({segments[-1], *cached})
