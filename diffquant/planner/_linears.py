"""Linears: each stored layer is cut along N for the modules it serves, and a module's are joined along K."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from diffquant.families import Rule
from diffquant.formats import Reading, StoredLayer, StoredPart
from diffquant.headers import Header
from diffquant.patterns import matches
from diffquant.plan import DENSE, LayerPlan, Piece, Question, Role, Span
from diffquant.planner._modules import Modules
from diffquant.planner._problems import Problems
from diffquant.planner._references import TORCH_NAMES, references, torch_name
from diffquant.planner._rows import fits, offsets, taken


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece in its module, its place along K not yet settled."""

    path: str
    piece: Piece
    order: int
    why: str
    dtype: str


class Linears:
    """The linears of a component as its file fills them.

    rest     tensors that are part of no linear, in the order of the file
    encoded  quantized weights of modules that are no linear
    paths    by stored layer, the modules it serves
    """

    def __init__(
        self,
        header: Header,
        reading: Reading,
        unmentioned: Sequence[str],
        modules: Modules,
        problems: Problems,
    ) -> None:
        self.header = header
        self.reading = reading
        self.modules = modules
        self.problems = problems
        self.rest = dict.fromkeys(unmentioned)
        self.encoded: list[tuple[StoredLayer, Rule]] = []
        self.paths: dict[str, tuple[str, ...]] = {}
        self.layers = self._laid_out()

    def questions(self) -> Iterator[Question]:
        """What only data can answer, asked of the modules instead of the stored layers."""
        for open_part in self.reading.open:
            paths = (path for name in open_part.layers for path in self.paths.get(name, ()))
            yield Question(
                topic=open_part.topic,
                role=open_part.role,
                layouts=open_part.layouts,
                paths=tuple(dict.fromkeys(paths)),
                why=open_part.why,
            )

    def _laid_out(self) -> tuple[LayerPlan, ...]:
        """In module order, so that a plan does not depend on the order of tensors in a file."""
        placed: dict[str, list[_Placed]] = defaultdict(list)
        for layer in self._stored():
            for item in self._place(layer):
                placed[item.path].append(item)
        order = {name: index for index, name in enumerate(self.modules.inventory.shapes)}
        paths = sorted(placed, key=lambda path: order.get(f"{path}.weight", 0))
        return tuple(self._layer(path, placed[path]) for path in paths)

    # what is stored ----------------------------------------------------------------------------

    def _stored(self) -> Iterator[StoredLayer]:
        """The format's layers with their biases, then the dense linears nobody mentioned."""
        for layer in self.reading.layers:
            yield replace(layer, parts=(*layer.parts, *self._bias(layer.name)))
        for name in [name for name in self.rest if self._is_linear(name)]:
            yield self._dense(name)

    def _bias(self, stem: str) -> Iterator[StoredPart]:
        name = f"{stem}.bias"
        if name in self.rest:
            del self.rest[name]
            yield StoredPart(Role.BIAS, name)

    def _is_linear(self, name: str) -> bool:
        if not name.endswith(".weight") or len(self.header.tensors[name].shape) < 2:
            return False
        rows = self.modules.spelling.rows(name.removesuffix(".weight"))
        return bool(rows) and all(row in self.modules.inventory.linears for row in rows)

    def _dense(self, name: str) -> StoredLayer:
        stem = name.removesuffix(".weight")
        tensor = self.header.tensors[name]
        del self.rest[name]
        return StoredLayer(
            name=stem,
            stored_NK=(tensor.shape[0], prod(tensor.shape[1:])),
            encoding=DENSE,
            parts=(StoredPart(Role.CODES, name), *self._bias(stem)),
            why=f"stored {torch_name(tensor.dtype)}",
        )

    # where it goes -----------------------------------------------------------------------------

    def _place(self, layer: StoredLayer) -> Iterator[_Placed]:
        """The modules a stored layer serves, each with its cut of it."""
        rule = self.modules.spelling.rule(layer.name)
        linears = self.modules.inventory.linears
        if rule is None or not all(row in linears for row in rule.rows):
            self._place_elsewhere(layer, rule)
            return
        self.paths[layer.name] = rule.rows
        counts = [self.modules.shape_NK(row)[0] for row in rule.rows]
        if not fits(layer.stored_NK[0], sum(counts)):
            self.problems.misfit(layer, rule, sum(counts))
            return
        start = 0
        for row, count in zip(rule.rows, counts, strict=True):
            piece = self._piece(layer, rule, row, Span(start, start + count))
            yield _Placed(row, piece, rule.cols or 0, layer.why, self._dtype(layer))
            start += count

    def _place_elsewhere(self, layer: StoredLayer, rule: Rule | None) -> None:
        """A quantized convolution or table is decoded while loading; anything else has no owner."""
        if rule is None or self.modules.weight_of(rule.rows[0]) is None:
            self.problems.unowned(layer.name, rule)
            return
        self.encoded.append((layer, rule))
        for part in layer.parts:
            if part.role is Role.BIAS:
                self.rest[part.tensor] = None

    def _piece(self, layer: StoredLayer, rule: Rule, path: str, rows: Span) -> Piece:
        n, k = self.modules.shape_NK(path)
        chunks = self._chunks(path) if layer.interleaved else None
        shift = layer.gelu_shift if layer.gelu_shift and self._behind_gelu(path, rule) else 0.0
        activation = layer.activation
        if shift and activation is not None:
            activation = replace(activation, unsigned=True)
        return Piece(
            encoding=layer.encoding,
            stored_NK=layer.stored_NK,
            parts=references(self.header, layer.parts),
            out=Span(0, n),
            cols=Span(0, layer.stored_NK[1] if rule.cols is not None else k),
            take=taken(layer, rule, rows, chunks),
            activation=activation,
            smooth=layer.smooth,
            shift=shift,
            rotation=layer.rotation,
            lowrank_input=layer.lowrank_input,
            bias_offsets=offsets(n, chunks) if layer.plus_one else (),
        )

    def _layer(self, path: str, items: list[_Placed]) -> LayerPlan:
        shape_NK = self.modules.shape_NK(path)
        first, *others = sorted(items, key=lambda item: item.order)
        pieces, start = [first.piece], len(first.piece.cols)
        for item in others:
            width = len(item.piece.cols)
            pieces.append(replace(item.piece, cols=Span(start, start + width)))
            start += width
        found = start if others else first.piece.stored_NK[1]
        if start != shape_NK[1] or not (others or fits(found, shape_NK[1])):
            expected = f"the {self.modules.class_name} expects {shape_NK[1]}"
            self.problems.add(path, f"stores K {found}, {expected}")
        return LayerPlan(
            path=path,
            shape_NK=shape_NK,
            pieces=tuple(pieces),
            dtype=first.dtype,
            why=first.why,
        )

    # what the family and the header say of it --------------------------------------------------

    def _behind_gelu(self, path: str, rule: Rule) -> bool:
        """Whether GELU feeds the layer, or the slice of its input this rule speaks of."""
        key = path if rule.cols is None else f"{path}:{rule.cols}"
        fed = self.modules.family.fed_by.items()
        return any(matches(pattern, key) for pattern, kind in fed if "gelu" in kind)

    def _chunks(self, path: str) -> tuple[int, tuple[int, ...]] | None:
        for pattern, chunks in self.modules.family.chunked.items():
            if matches(pattern, path):
                return chunks
        self.problems.add(path, "is stored interleaved, and the family names no chunks")
        return None

    def _dtype(self, layer: StoredLayer) -> str:
        """What the layer computes in: the dtype of its plain tensors, bfloat16 when it has none."""
        for part in layer.parts:
            name = TORCH_NAMES.get(self.header.tensors[part.tensor].dtype)
            if part.role in (Role.BIAS, Role.SMOOTH, Role.CODES) and name is not None:
                return name
        return "bfloat16"
