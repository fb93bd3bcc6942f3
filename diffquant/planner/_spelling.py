"""How a file spells the names of modules: what it puts before them, and which naming it goes by."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffquant.families import Family, Inventory, Naming, Rule, located
from diffquant.formats import Reading

#: What single-file checkpoints put before every name.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")

LEAVES = (".weight", ".bias")


@dataclass(frozen=True, slots=True)
class Spelling:
    """Stored names without `prefix` are those of `naming`."""

    prefix: str
    naming: Naming

    def rule(self, stored: str) -> Rule | None:
        """What the naming says of a stored name."""
        return located(self.naming, stored.removeprefix(self.prefix))

    def rows(self, stored: str) -> tuple[str, ...]:
        """The modules that a stored weight serves, one above the other along N."""
        rule = self.rule(stored)
        return () if rule is None else rule.rows


def spelling_of(
    names: Sequence[str], reading: Reading, family: Family, inventory: Inventory | None
) -> Spelling:
    """The prefix and naming under which most stored names belong to a module of the inventory;
    without one, the naming that renames most. The first wins among equals."""
    if reading.naming is not None:
        namings = [family.namings[reading.naming]]
    else:
        namings = list(family.namings.values())
    prefix = _prefix(names, reading, family)
    stripped = [name.removeprefix(prefix) for name in names]
    if inventory is None:
        scores = [sum(renamed(naming, name) for name in stripped) for naming in namings]
    else:
        scores = [_owned(naming, stripped, inventory) for naming in namings]
    return Spelling(prefix, namings[scores.index(max(scores))])


def agreeing(
    inventory: Inventory, stored: Sequence[str], reading: Reading, family: Family
) -> Inventory | None:
    """The base's inventory, unless the file spells most names in another way: which of two
    spellings is the class's own is known once there is a class."""
    prefix = _prefix(stored, reading, family)
    names = [name.removeprefix(prefix) for name in stored]
    known = max(_owned(each, names, inventory) for each in family.namings.values())
    return inventory if 2 * known >= len(names) else None


def _prefix(names: Sequence[str], reading: Reading, family: Family) -> str:
    """What stands before most stored names of this kind of model."""
    prefixes = PREFIXES if family.part == "transformer" else PREFIXES[:1]
    return reading.strip or max(
        prefixes, key=lambda text: (sum(name.startswith(text) for name in names), len(text))
    )


def _owned(naming: Naming, names: Sequence[str], inventory: Inventory) -> int:
    """How many stored modules or lone parameters land in the inventory."""
    parents = {module(name) for name in inventory.shapes} | set(inventory.shapes)
    rules = (located(naming, name) for name in names)
    return sum(rule is not None and all(row in parents for row in rule.rows) for rule in rules)


def renamed(naming: Naming, name: str) -> bool:
    """Whether a rule of the naming covers the name, and not its fall-through."""
    rule = located(naming, name)
    return rule is not None and rule.rows != (name,)


def split(tensor: str) -> tuple[str, str]:
    """(module, '.weight' or '.bias'); a lone parameter keeps its whole name."""
    for leaf in LEAVES:
        if tensor.endswith(leaf):
            return tensor.removesuffix(leaf), leaf
    return tensor, ""


def module(tensor: str) -> str:
    """The module a tensor is of; one at the top is its own."""
    return tensor.rsplit(".", 1)[0] if "." in tensor else tensor
