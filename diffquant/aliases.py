"""What people paste from other tools, in our words. The table is `aliases.toml`; nothing else is.

Nothing typed is silently ignored: a foreign flag becomes ours, or is answered with a note, or is
refused by name. The same holds for the environment.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from diffquant.errors import UsageError

TABLE = Path(__file__).with_name("aliases.toml")
FOREIGN_PREFIX = "SGLANG_"
SWITCH_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Value:
    """What becomes of one value: a value of ours in `to`, or a note that says why none is needed.

    on  kinds and generations of devices where a GEMM backend of that name exists
    """

    to: str | None = None
    note: str = ""
    on: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A foreign flag; `aliases.toml` explains the fields."""

    to: str | None = None
    note: str = ""
    refused: str | None = None
    switch: bool = False
    yields: bool = False
    only: str | None = None
    values: Mapping[str, Value] = field(default_factory=dict)
    order: Mapping[str, Sequence[str]] = field(default_factory=dict)
    default: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A value of --quantization: one of ours to quantize to, a file's format to assert, or neither."""

    online: str | None = None
    format: str | None = None
    encoding: str | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """An environment variable that stands for a flag."""

    to: str
    only_with: str | None = None


@dataclass(frozen=True, slots=True)
class Translation:
    """Arguments in our words, and a sentence for each that was put differently."""

    arguments: tuple[str, ...]
    notes: tuple[str, ...] = ()


@cache
def flags() -> Mapping[str, Flag]:
    """Foreign flags by their spelling."""
    return {name: _flag(entry) for name, entry in _table()["flags"].items()}


@cache
def quantizations() -> Mapping[str, Quantization]:
    """Values of --quantization beside the names of schemes: synonyms, formats, and what is refused."""
    return {name: Quantization(**entry) for name, entry in _table()["quantization"].items()}


@cache
def variables() -> Mapping[str, Variable]:
    """Environment variables that are honoured."""
    return {name: Variable(**entry) for name, entry in _table()["environment"].items()}


def translate(arguments: Sequence[str]) -> Translation:
    """Replace foreign flags by ours. Raises UsageError for those that are refused."""
    ours: list[str] = []
    weak: list[str] = []
    notes: list[str] = []
    for flag, value in _pairs(arguments):
        alias = flags().get(flag)
        if alias is None:
            ours += [flag] if value is None else [flag, value]
            continue
        words, note = _answer(flag, alias, value)
        if alias.yields:
            weak += words
        else:
            ours += words
        notes += [note] if note else []
    # Of two words for one option the later wins.
    return Translation((*weak, *ours), tuple(notes))


def from_environment(environ: Mapping[str, str], arguments: Sequence[str]) -> Translation:
    """The flags that foreign variables stand for, unless the arguments say it themselves."""
    ours: list[str] = []
    notes: list[str] = []
    for name, variable in variables().items():
        if not (value := environ.get(name)):
            continue
        if variable.to in arguments:
            notes.append(f"{name} is overruled by {variable.to}")
        elif variable.only_with and variable.only_with not in arguments:
            notes.append(f"{name} has no effect without {variable.only_with}")
        else:
            notes.append(f"{name} is read as {variable.to} {value}")
            ours += [variable.to, value]
    return Translation(tuple(ours), tuple(notes))


def heard(environ: Mapping[str, str]) -> dict[str, str]:
    """Every foreign variable that is set -> what becomes of it."""
    seen = sorted(name for name in environ if name.startswith(FOREIGN_PREFIX))
    return {name: _fate(name, environ[name]) for name in seen}


def _fate(name: str, value: str) -> str:
    variable = variables().get(name)
    return "not read by diffquant" if variable is None else f"read as {variable.to} {value}"


def _answer(flag: str, alias: Flag, value: str | None) -> tuple[list[str], str]:
    """Our words for one foreign flag, and the note; none for what is ours too."""
    if alias.switch:
        return _answer_switch(flag, alias, value)
    if value is None:
        raise UsageError(f"{flag} needs a value")
    if value == alias.only:
        return [], f"{flag} {value} is not needed: {alias.note}"
    if alias.refused is not None:
        raise UsageError(f"{flag} {value}: {alias.refused}", hint=f"leave {flag} out")
    if alias.values:
        return _answer_value(flag, alias, value)
    if alias.to is None:
        return [], f"{flag} {value} is not needed: {alias.note}"
    return [alias.to, value], f"{flag} is {alias.to} here: {alias.note}"


def _answer_switch(flag: str, alias: Flag, value: str | None) -> tuple[list[str], str]:
    word = (value or "true").lower()
    if word not in SWITCH_WORDS:
        raise UsageError(f"{flag} has no value {value!r}", hint=f"{flag} true")
    if not SWITCH_WORDS[word]:
        return [], f"{flag} false is not needed: that is how it is here"
    if alias.refused is not None:
        raise UsageError(f"{flag}: {alias.refused}", hint=f"leave {flag} out")
    if alias.to == flag:
        return [flag], ""
    if alias.to is not None:
        return alias.to.split(), f"{flag} is {alias.to} here: {alias.note}"
    return [], f"{flag} is not needed: {alias.note}"


def _answer_value(flag: str, alias: Flag, value: str) -> tuple[list[str], str]:
    meant = alias.values.get(value)
    if meant is None:
        raise UsageError(
            f"{flag} has no value {value!r}", hint=f"one of: {', '.join(alias.values)}"
        )
    if meant.to is None or alias.to is None:
        where = f" (there it is for {', '.join(meant.on)})" if meant.on else ""
        return [], f"{flag} {value} is not needed: {meant.note}{where}"
    return [alias.to, meant.to], f"{flag} {value} is {alias.to} {meant.to} here"


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each word, and for a foreign flag the value that belongs to it."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        alias = flags().get(_hyphened(flag))
        if alias is None:
            yield word, None
        elif equals:
            yield _hyphened(flag), value
        elif words and _is_value(alias, words[0]):
            yield _hyphened(flag), words.pop(0)
        else:
            yield _hyphened(flag), None


def _hyphened(flag: str) -> str:
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _is_value(alias: Flag, word: str) -> bool:
    return word.lower() in SWITCH_WORDS if alias.switch else not word.startswith("--")


def _flag(entry: Mapping[str, Any]) -> Flag:
    values = {name: Value(**meant) for name, meant in entry.get("values", {}).items()}
    return Flag(**{**entry, "values": values})


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))
