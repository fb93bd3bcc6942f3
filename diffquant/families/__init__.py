"""Transformer architectures: facts only, one file per family.

An inventory lists every parameter of the diffusers class for a config. A naming is a table from
the names some file uses for its layers to modules of that class: one stored linear may be several
modules stacked along N (`rows`), or a slice along K of one (`cols`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffquant.plugins import Registry

Shape = tuple[int, ...]


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

    class_names    diffusers classes, the first is the canonical one
    inventory      config -> Inventory
    config_from    shapes in diffusers names -> config good enough for `inventory`, or None
    namings        by name: diffusers, bfl, nunchaku, original, sglang …
    sensitive      patterns of layers that stay in high precision by default (online quantization)
    blocks         names of the repeated blocks' ModuleLists
    siblings       groups of linears fed by the same input in one block (q, k, v), as path suffixes
    fed_by         suffix pattern -> what feeds the layer ("gelu_tanh", "silu_gate")
    chunked        modulation layers: path pattern -> number of chunks (shift, scale, gate …), and
                   which chunks are scales
    float32        patterns of modules the class keeps in float32
    """

    class_names: tuple[str, ...]
    inventory: Callable[[Mapping[str, Any]], Inventory]
    namings: Mapping[str, Naming]
    config_from: Callable[[Mapping[str, Shape]], Mapping[str, Any] | None] | None = None
    sensitive: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    siblings: tuple[tuple[str, ...], ...] = ()
    fed_by: Mapping[str, str] = field(default_factory=dict)
    chunked: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    float32: tuple[str, ...] = ()
    mlp: Sequence[str] = ()
    attention: Sequence[str] = ()


FAMILIES: Registry[Family] = Registry("diffquant.families", "FAMILY")
