"""Transformer architectures: facts only, one file per family.

An inventory lists every parameter of the diffusers class for a config. A naming is a table from
the names some file uses for its layers to modules of that class: one stored linear may be several
modules stacked along N (`rows`), or a slice along K of one (`cols`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffquant.plugins import Registry

Shape = tuple[int, ...]
Part = Literal["transformer", "text_encoder", "autoencoder"]


@dataclass(frozen=True, slots=True)
class Inventory:
    """Every parameter (and persistent buffer) of the module, in diffusers names.

    shapes    name -> shape
    linears   paths of the nn.Linear modules: `path.weight` [N, K] and maybe `path.bias` are theirs
    """

    shapes: Mapping[str, Shape]
    linears: frozenset[str]


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a naming, for modules or single parameters alike (names without .weight/.bias).

    stored   the file's name; {i}, {j} stand for block numbers
    rows     module(s) of the diffusers class stacked along N in the stored weight, in stored order
    cols     the stored weight is the `cols`-th slice along K of rows[0] (0-based); None: all of K
    chunks   the stored rows are equal chunks of rows[0] in another order: (1, 0) means the stored
             first half is the module's second half
    """

    stored: str
    rows: tuple[str, ...]
    cols: int | None = None
    chunks: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Naming:
    """A way files spell this family's names. Names that no rule covers are spelled as diffusers does
    when `falls_through` is set, and belong to nothing otherwise.

    suffixes  renames of the last segment, such as (".scale", ".weight") for BFL's norms
    """

    rules: tuple[Rule, ...] = ()
    suffixes: Mapping[str, str] = field(default_factory=dict)
    falls_through: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture.

    part           what it is of a pipeline
    class_names    diffusers (or transformers) classes, the first is the canonical one
    inventory      config -> Inventory; `told_by_header` where no config tells it
    tables         patterns of two-dimensional weights that are no linears, where a header tells
    tied           parameter -> the one it shares its numbers with, so that a file stores either
    surplus        pattern of stored tensors no class of the family has -> what they are
    config_from    shapes in diffusers names -> config good enough for `inventory`, or None
    namings        by name: diffusers, bfl, nunchaku, original, sglang …
    sensitive      patterns of layers that stay in high precision by default (online quantization)
    reasons        why, for those patterns that no preset explains
    blocks         names of the repeated blocks' ModuleLists
    siblings       groups of linears fed by the same input in one block (q, k, v), as path suffixes
    joined         layers whose input is the outputs of others side by side: path pattern -> those,
                   as path suffixes, in the order of the columns
    fed_by         suffix pattern -> what feeds the layer ("gelu_tanh", "silu_gate")
    chunked        modulation layers: path pattern -> number of chunks (shift, scale, gate …), and
                   which chunks are scales
    float32        patterns of modules the class keeps in float32
    """

    class_names: tuple[str, ...]
    inventory: Callable[[Mapping[str, Any]], Inventory]
    namings: Mapping[str, Naming]
    part: Part = "transformer"
    tables: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    surplus: Mapping[str, str] = field(default_factory=dict)
    config_from: Callable[[Mapping[str, Shape]], Mapping[str, Any] | None] | None = None
    sensitive: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    siblings: tuple[tuple[str, ...], ...] = ()
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fed_by: Mapping[str, str] = field(default_factory=dict)
    chunked: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    mlp: Sequence[str] = ()
    attention: Sequence[str] = ()

    @property
    def is_described(self) -> bool:
        """Whether a config tells the inventory; where none does, the header of a checkpoint must."""
        return self.inventory is not told_by_header


def told_by_header(config: Mapping[str, Any]) -> Inventory:
    """The inventory of every family whose classes nobody described: empty, whatever the config."""
    return Inventory(shapes={}, linears=frozenset())


FAMILIES: Registry[Family] = Registry("diffquant.families", "FAMILY")


def located(naming: Naming, stored: str) -> Rule | None:
    """What a stored name means: its rule with the block numbers filled in, or None for nothing.

    `stored` is a module's name without .weight/.bias, or the whole name of a lone parameter (a
    table, a token, BFL's `norm.query_norm.scale`); the rule's rows are then of the same kind. A
    name under no rule is its own when the naming falls through. A weight and its bias follow one
    rule: rows and chunks hold for both; a bias has no columns, so the biases stored with the
    `cols` of one module add up.
    """
    key, numbers = _blanked(stored)
    for entry in _book(naming.rules).by_stored.get(key, ()):
        if entry.fits(numbers):
            return entry.filled(numbers)
    return Rule(stored, (stored,)) if naming.falls_through else None


def spelled(naming: Naming, path: str) -> tuple[str, ...]:
    """Stored names that hold a module, or a whole parameter name, of the diffusers class.

    The inverse of `located`. Several names are the slices of one module along K, in order, or
    spellings a file may choose from: the first is the one to write.
    """
    key, numbers = _blanked(path)
    entries = _book(naming.rules).by_row.get(key, ())
    names = tuple(entry.filled(numbers).stored for entry in entries if entry.fits(numbers))
    stem, dot, leaf = path.rpartition(".")
    if not names and leaf in ("weight", "bias"):
        return tuple(name + dot + leaf for name in spelled(naming, stem))
    return names or ((path,) if naming.falls_through else ())


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_SLOT = re.compile(r"(?<![^.])(?:\d+|\{[a-z]\})(?![^.])")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A rule as found through one of its names.

    literals  numbers that name spells out, by their place among all its numbers
    blanks    its placeholders, by the same places
    """

    rule: Rule
    literals: Mapping[int, str]
    blanks: Mapping[int, str]

    def fits(self, numbers: Sequence[str]) -> bool:
        return all(numbers[place] == number for place, number in self.literals.items())

    def filled(self, numbers: Sequence[str]) -> Rule:
        rule = self.rule
        stored, rows = rule.stored, rule.rows
        for place, blank in self.blanks.items():
            stored = stored.replace(blank, numbers[place])
            rows = tuple(row.replace(blank, numbers[place]) for row in rows)
        return Rule(stored, rows, rule.cols, rule.chunks)


@dataclass(frozen=True, slots=True)
class _Book:
    """Rules by their names with every number blanked: one look-up finds the few that may fit."""

    rules: tuple[Rule, ...]
    by_stored: Mapping[str, Sequence[_Entry]]
    by_row: Mapping[str, Sequence[_Entry]]


#: By identity, since hashing some sixty rules per name would cost more than the look-up. A book
#: keeps its rules alive, so no other rules can come by the same identity.
_BOOKS: dict[int, _Book] = {}


def _book(rules: tuple[Rule, ...]) -> _Book:
    if id(rules) not in _BOOKS:
        by_stored: dict[str, list[_Entry]] = {}
        by_row: dict[str, list[_Entry]] = {}
        for rule in rules:
            by_stored.setdefault(_SLOT.sub("#", rule.stored), []).append(_entry(rule, rule.stored))
            for row in rule.rows:
                by_row.setdefault(_SLOT.sub("#", row), []).append(_entry(rule, row))
        _BOOKS[id(rules)] = _Book(rules, by_stored, by_row)
    return _BOOKS[id(rules)]


def _entry(rule: Rule, name: str) -> _Entry:
    slots = dict(enumerate(_SLOT.findall(name)))
    return _Entry(
        rule,
        literals={place: slot for place, slot in slots.items() if slot.isdigit()},
        blanks={place: slot for place, slot in slots.items() if not slot.isdigit()},
    )


def _blanked(name: str) -> tuple[str, list[str]]:
    return _NUMBER.sub("#", name), _NUMBER.findall(name)
