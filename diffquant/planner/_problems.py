"""What is wrong with a draft: tensors without an owner, modules without a tensor, what does not fit."""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from diffquant.families import Rule
from diffquant.formats import StoredLayer
from diffquant.plan import LayerPlan, Plain, Plan, Problem, Role
from diffquant.planner._modules import BIASES, Modules

#: Problems that get a nearest name: to find one takes time that grows with the model.
NEAREST = 10


@dataclass(frozen=True, slots=True)
class Problems:
    """Those found so far, in the order they were found."""

    modules: Modules
    found: list[Problem] = field(default_factory=list)

    def add(self, name: str, what: str) -> None:
        """A stored tensor, a parameter or a layer, and what is wrong with it."""
        self.found.append(Problem(name, what))

    def unowned(self, name: str, rule: Rule | None = None) -> None:
        """A stored name that belongs to nothing, with the name that it may be meant for."""
        spelled = name if rule is None else rule.rows[0]
        inventory = self.modules.inventory
        near = []
        if len(self.found) < NEAREST:
            known = [*inventory.linears, *inventory.shapes]
            near = difflib.get_close_matches(spelled, known, n=1, cutoff=0.6)
        nearest = f", nearest is {near[0]!r}" if near else ""
        self.add(name, f"belongs to no module of {self.modules.class_name}{nearest}")

    def misfit(self, layer: StoredLayer, rule: Rule, wanted: int) -> None:
        """A stored layer of another height than its modules have together."""
        paths = ", ".join(repr(row) for row in rule.rows)
        class_name = self.modules.class_name
        self.add(
            layer.name, f"stores N {layer.stored_NK[0]}, {paths} of {class_name} need {wanted}"
        )

    def check(self, layers: Iterable[LayerPlan], plain: Iterable[Plain]) -> None:
        """Every parameter of the module has a source; a layer without a stored bias misses it."""
        given = {item.name for item in plain}
        for layer in layers:
            given.add(f"{layer.path}.weight")
            if any(BIASES & piece.roles or piece.shift for piece in layer.pieces):
                given.add(f"{layer.path}.bias")
            self._check_cover(layer)
        known, class_name = self.modules.inventory.shapes, self.modules.class_name
        for name in known:
            if name not in given:
                self.add(name, f"of {class_name} has no stored tensor")
        for layer in layers:
            bias = f"{layer.path}.bias"
            if bias in given and bias not in known and not _may_store_zero(layer):
                self.add(bias, f"is stored, {class_name} has no such bias")

    def _check_cover(self, layer: LayerPlan) -> None:
        n, k = layer.shape_NK
        area = sum(len(piece.out) * len(piece.cols) for piece in layer.pieces)
        if area != n * k and not any(item.tensor == layer.path for item in self.found):
            pieces = f"{len(layer.pieces)} stored pieces"
            self.add(layer.path, f"has {pieces} that cover {area} of {n * k} weights")


def _may_store_zero(layer: LayerPlan) -> bool:
    """SVDQuant writers, the only ones that divide, store a zero bias on layers that have none."""
    return any(piece.smooth == "divide" for piece in layer.pieces)


def missing_scales(plan: Plan) -> Iterator[Problem]:
    """A missing weight-side scale is an error, never 1.0."""
    from diffquant.encodings import ENCODINGS

    codecs = ENCODINGS.load_all()
    for layer in plan.layers:
        for piece in layer.pieces:
            codec = codecs[piece.encoding.name]
            if not codec.is_complete(piece.encoding, piece.roles):
                codes = piece.part(Role.CODES)
                stored = codes.ref.name if codes else layer.path
                needed = " or ".join(sorted("+".join(sorted(roles)) for roles in codec.scales))
                yield Problem(stored, f"is {piece.encoding} without its scale ({needed})")
