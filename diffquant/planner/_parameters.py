"""Parameters that are no linear's: norms, tables and convolutions, each with the tensor that gives it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from diffquant.families import Rule
from diffquant.formats import StoredLayer
from diffquant.headers import Header
from diffquant.plan import Part, Plain, PlainSource, Role, Span
from diffquant.planner._modules import Modules
from diffquant.planner._problems import Problems
from diffquant.planner._references import reference, references, torch_name
from diffquant.planner._rows import permuted
from diffquant.planner._spelling import split


@dataclass(frozen=True, slots=True)
class Parameters:
    """The plain parameters of a component as its file fills them."""

    header: Header
    modules: Modules
    problems: Problems

    def plain(
        self, tensors: Iterable[str], encoded: Iterable[tuple[StoredLayer, Rule]]
    ) -> Iterator[Plain]:
        """Of plain tensors, then of quantized weights of modules that are no linear."""
        sources: dict[str, list[tuple[str, Rule]]] = defaultdict(list)
        for tensor in tensors:
            owner = self._owner(tensor)
            if owner is None:
                self.problems.unowned(tensor)
                continue
            for parameter, rule in owner:
                sources[parameter].append((tensor, rule))
        for parameter, given in sources.items():
            yield self._stored_plain(parameter, given)
        for layer, rule in encoded:
            yield self._stored_encoded(layer, rule)

    def _owner(self, tensor: str) -> list[tuple[str, Rule]] | None:
        """The parameters a plain tensor serves, each with the rule that says so."""
        stem, leaf = split(tensor)
        for name, ending in ((tensor, ""), (stem, leaf)):
            rule = self.modules.spelling.rule(name)
            owned = [] if rule is None else [row + ending for row in rule.rows]
            if rule is not None and all(name in self.modules.inventory.shapes for name in owned):
                return [(name, rule) for name in owned]
        return None

    def _stored_plain(self, parameter: str, given: list[tuple[str, Rule]]) -> Plain:
        shape = self.modules.inventory.shapes[parameter]
        tensor, rule = given[0]
        stored = self.header.tensors[tensor]
        if len(given) > 1:
            self.problems.add(tensor, f"and {given[1][0]!r} both give {parameter!r}")
        take = self._taken(parameter, rule)
        if prod(stored.shape) != prod(shape) and not take:
            what = f"has shape {list(stored.shape)}, {parameter!r} needs {list(shape)}"
            self.problems.add(tensor, what)
        codes = Part(Role.CODES, reference(self.header, tensor))
        return Plain(
            name=parameter,
            shape=shape,
            sources=(PlainSource(parts=(codes,), take=take),),
            dtype=torch_name(stored.dtype),
            why="plain",
        )

    def _stored_encoded(self, layer: StoredLayer, rule: Rule) -> Plain:
        parameter = self.modules.weight_of(rule.rows[0])
        assert parameter is not None, "only weights that have a place are brought here"
        shape = self.modules.inventory.shapes[parameter]
        if prod(layer.stored_NK) != prod(shape):
            what = f"stores {list(layer.stored_NK)}, {parameter!r} needs {list(shape)}"
            self.problems.add(layer.name, what)
        parts = references(self.header, (p for p in layer.parts if p.role is not Role.BIAS))
        return Plain(
            name=parameter,
            shape=shape,
            sources=(PlainSource(parts=parts, encoding=layer.encoding, stored_NK=layer.stored_NK),),
            dtype="bfloat16",
            why=f"{layer.encoding}, decoded while loading: no linear ({layer.why})",
        )

    def _taken(self, parameter: str, rule: Rule) -> tuple[Span, ...]:
        """Stored rows that the parameter takes, in its own order; none for all as they lie."""
        leaf = "." + parameter.rsplit(".", 1)[-1]
        known = self.modules.inventory.shapes
        shapes = [known.get(row + leaf, known.get(row)) for row in rule.rows]
        counts = [shape[0] if shape else 0 for shape in shapes]
        if rule.chunks is not None:
            return permuted(counts[0], rule.chunks)
        if len(rule.rows) == 1:
            return ()
        index = [row + leaf for row in rule.rows].index(parameter)
        start = sum(counts[:index])
        return (Span(start, start + counts[index]),)
