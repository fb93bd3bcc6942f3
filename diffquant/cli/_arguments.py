"""From the words a person typed to the words click parses.

Weakest first: environment, --config-from-metadata, --config, what was typed. Each source becomes
words of the command line, in this order; of two words for one option the later wins.
"""

import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from diffquant import aliases
from diffquant.errors import UsageError

#: Options that take a list: comma-separated, or several words.
LISTS = frozenset({"--quantization-ignored-layers"})
#: Options that are said once for each of several values.
REPEATED = frozenset({"--image", "--lora"})
CONFIG = "--config"
METADATA = "--config-from-metadata"

#: Options that exist for every component of a pipeline, and the field of ModelFlags they fill.
COMPONENT_OPTIONS = tuple(
    (re.compile(pattern), target)
    for pattern, target in (
        (r"--component-paths\.([\w-]+)", "component_paths"),
        (r"--component-weights-paths\.([\w-]+)", "component_weights_paths"),
        (r"--component-quantizations\.([\w-]+)", "component_quantizations"),
        (
            r"--component-quantization-ignored-layers\.([\w-]+)",
            "component_quantization_ignored_layers",
        ),
        (r"--([a-z][\w-]*)-weights-path", "component_weights_paths"),
        (r"--([a-z][\w-]*)-quantization", "component_quantizations"),
        (r"--([a-z][\w-]*)-path", "component_paths"),
    )
)
#: What components are called. Any other `--…-path` is a typing error, not a component.
COMPONENT_NAME = re.compile(
    r"(\w+_)?(transformer|unet|vae|text_encoder|image_encoder|tokenizer|scheduler|processor"
    r"|connectors|controlnet|prior|decoder|encoder|vocoder|feature_extractor)(_\w+)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Words for click; options of single components; notes to tell; what a picture's record pins."""

    words: tuple[str, ...]
    components: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def component_words(self) -> tuple[str, ...]:
        """The words that name single components, as they can be typed again."""
        return tuple(
            word
            for target, named in self.components.items()
            for component, source in named.items()
            for word in (f"--{target.replace('_', '-')}.{component}", source)
        )


class ModelCommand(click.Command):
    """A command that takes models, and so every way of naming them. `ctx.obj` is the Prepared."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        import os

        known = {option for param in self.params for option in param.opts}
        ctx.obj = prepare(args, known, os.environ)
        return super().parse_args(ctx, list(ctx.obj.words))


def prepare(typed: Sequence[str], known: Collection[str], environ: Mapping[str, str]) -> Prepared:
    """Bring everything a person said, anywhere, into one row of words.

    Raises UsageError for unreadable files, refused foreign flags and components that cannot be.
    """
    words = list(_listed(_split_equals(typed)))
    config, record = _taken(words, CONFIG), _taken(words, METADATA)
    told = read_record(Path(record)) if record else {}
    said = [*record_words(told), *(config_words(Path(config)) if config else ()), *words]
    heard = aliases.from_environment(environ, said)
    ours = aliases.translate([*heard.arguments, *said])
    rest, components = _components(ours.arguments, known)
    return Prepared(
        words=tuple(rest),
        components=components,
        notes=(*heard.notes, *ours.notes),
        record=told,
    )


def config_words(path: Path) -> Iterator[str]:
    """A JSON or TOML file of options, spelled with hyphens or underscores, as words."""
    readers = {".json": json.loads, ".toml": tomllib.loads}
    if path.suffix not in readers:
        raise UsageError(f"{CONFIG} reads JSON and TOML, not {path.name!r}", hint="config.toml")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{CONFIG} {str(path)!r} cannot be read: {error}") from error
    return _words(content)


def record_words(record: Mapping[str, Any]) -> Iterator[str]:
    """The options a picture was made with."""
    return _words({**record.get("flags", {}), **record.get("request", {})})


def read_record(path: Path) -> dict[str, Any]:
    from diffquant.run import read_metadata

    return read_metadata(path)


def _words(options: Mapping[str, Any], prefix: str = "--") -> Iterator[str]:
    for key, value in options.items():
        option = prefix + key.replace("_", "-")
        if isinstance(value, Mapping):
            yield from _words(value, prefix=f"{option}.")
        elif value is True:
            yield option
        elif option in REPEATED and not isinstance(value, str):
            yield from (word for each in value or () for word in (option, str(each)))
        elif isinstance(value, list | tuple):
            yield from (option, ",".join(map(str, value))) if value else ()
        elif value is not None and value is not False:
            yield from (option, str(value))


def _split_equals(words: Sequence[str]) -> Iterator[str]:
    """`--flag=value` is two words, as everywhere below."""
    for word in words:
        flag, equals, value = word.partition("=")
        yield from (flag, value) if equals and flag.startswith("--") else (word,)


def _listed(words: Iterator[str]) -> Iterator[str]:
    """`--list a b,c` is `--list a,b,c`."""
    gathering: list[str] | None = None
    for word in words:
        if gathering is not None and not word.startswith("--"):
            gathering.append(word)
            continue
        if gathering:
            yield ",".join(gathering)
        gathering = [] if word in LISTS else None
        yield word
    if gathering:
        yield ",".join(gathering)


def _taken(words: list[str], option: str) -> str | None:
    """Remove the option and its value from the words; the last value counts."""
    value = None
    while option in words:
        place = words.index(option)
        if place + 1 == len(words):
            raise UsageError(f"{option} needs a file")
        value = words[place + 1]
        del words[place : place + 2]
    return value


def _components(
    words: Sequence[str], known: Collection[str]
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Words without the options of single components, and those by field and component."""
    rest: list[str] = []
    components: dict[str, dict[str, str]] = {}
    row = iter(words)
    for word in row:
        named = None if word in known else _component_option(word)
        if named is None:
            rest.append(word)
            continue
        value = next(row, None)
        if value is None or value.startswith("--"):
            raise UsageError(f"{word} needs a value")
        target, component = named
        components.setdefault(target, {})[component] = value
    return rest, components


def _component_option(word: str) -> tuple[str, str] | None:
    """The field and the component an option such as --transformer-2-path speaks of."""
    for pattern, target in COMPONENT_OPTIONS:
        if found := pattern.fullmatch(word):
            component = found[1].replace("-", "_")
            if "." in word or COMPONENT_NAME.fullmatch(component):
                return target, component
    return None
