"""The modules of a component: told by its config, by its family or by the stored shapes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from diffquant.errors import PlanError
from diffquant.families import Family, Inventory
from diffquant.formats import Reading
from diffquant.headers import Header
from diffquant.patterns import matches
from diffquant.plan import Plan, Role
from diffquant.planner._identity import class_of
from diffquant.planner._spelling import Spelling, agreeing, spelling_of, split

#: Parts that give a layer its bias.
BIASES = frozenset({Role.BIAS, Role.INT_BIAS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """What a component is made of, and how its file spells that."""

    family: Family
    config: Mapping[str, Any]
    inventory: Inventory
    spelling: Spelling

    @property
    def class_name(self) -> str:
        """For sentences, which speak of files without a config too."""
        return class_of(self.config) or "the model"

    def shape_NK(self, path: str) -> tuple[int, int]:
        """Of a module's weight; all axes after the first count as K."""
        n, *rest = self.inventory.shapes[f"{path}.weight"]
        return n, prod(rest)

    def weight_of(self, row: str) -> str | None:
        """The parameter an encoded tensor of that name gives: a lone one, or the module's weight."""
        names = (name for name in (row, f"{row}.weight") if name in self.inventory.shapes)
        return next(names, None)


def modules_of(
    header: Header,
    reading: Reading,
    unmentioned: Sequence[str],
    *,
    family: Family,
    config: Mapping[str, Any],
    inventory: Inventory | None,
) -> Modules:
    """The modules, and the spelling under which most stored names are theirs.

    unmentioned  tensors the format says nothing about
    inventory    of the base, where the family cannot tell it
    """
    stored = [layer.name for layer in reading.layers]
    stored += dict.fromkeys(split(name)[0] for name in unmentioned)
    if inventory is None and config and family.is_described:
        inventory = family.inventory(config)
    elif inventory is not None and not family.is_described:
        inventory = agreeing(inventory, stored, reading, family)
    spelling = spelling_of(stored, reading, family, inventory)
    needs_shapes = inventory is None or not config
    shapes = dict(_shapes(header, reading, unmentioned, spelling)) if needs_shapes else {}
    config = dict(config) or _inferred(family, shapes)
    if inventory is None and config and family.is_described:
        inventory = family.inventory(config)
    elif inventory is None:
        inventory = _told_by_shapes(shapes, reading, family, spelling)
    return Modules(family=family, config=config, inventory=inventory, spelling=spelling)


def _shapes(
    header: Header, reading: Reading, unmentioned: Sequence[str], spelling: Spelling
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes under diffusers names, as far as one stored tensor is one parameter."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer.name}.weight": layer.stored_NK for layer in reading.layers
    }
    shapes |= {
        f"{layer.name}.bias": layer.stored_NK[:1]
        for layer in reading.layers
        if any(part.role in BIASES for part in layer.parts)
    }
    shapes |= {name: header.tensors[name].shape for name in unmentioned}
    for name, shape in shapes.items():
        stem, leaf = split(name)
        rule = spelling.rule(stem)
        if rule is not None and rule.cols is None:
            n = shape[0] // len(rule.rows) if shape else 0
            for row in rule.rows:
                yield row + leaf, (n, *shape[1:]) if len(rule.rows) > 1 else shape


def _inferred(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """A config from the stored shapes, for a file that comes without one."""
    if family.config_from is None:
        return {}
    try:
        config = family.config_from(shapes)
    except (LookupError, ValueError, ArithmeticError) as error:
        raise PlanError(
            f"the stored shapes fit no {family.class_names[0]}: {error}",
            hint="is the file whole? a config.json beside it, or its base, would describe it",
        ) from error
    return dict(config) if config else {}


def _told_by_shapes(
    shapes: Mapping[str, tuple[int, ...]], reading: Reading, family: Family, spelling: Spelling
) -> Inventory:
    """Every stored matrix is a linear, but for what the family knows to be a table."""
    quantized = {row for layer in reading.layers for row in spelling.rows(layer.name)}
    matrices = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    tables = {
        path
        for path in matrices | quantized
        if any(matches(pattern, path) for pattern in family.tables)
    }
    return Inventory(shapes=shapes, linears=frozenset((matrices | quantized) - tables))


def inventory_of(plan: Plan) -> Inventory:
    """The module's parameters as the plan fills them."""
    shapes: dict[str, tuple[int, ...]] = {item.name: item.shape for item in plan.plain}
    for layer in plan.layers:
        shapes[f"{layer.path}.weight"] = layer.shape_NK
        if any(Role.BIAS in piece.roles for piece in layer.pieces):
            shapes[f"{layer.path}.bias"] = layer.shape_NK[:1]
    return Inventory(shapes=shapes, linears=frozenset(layer.path for layer in plan.layers))
