"""How well decoded weights keep the ones they were made from: one implementation for everybody.

W the decoded weight, B the base's, both [N, K], norms over all elements:

    relative_error   ‖W - B‖ / ‖B‖                 fp8 near 0.026, 4 bits near 0.1, unrelated √2
    sqnr_db          20 · log10(‖B‖ / ‖W - B‖)     decibels; infinite where nothing was lost
    max_error        largest |W - B|               in the weight's own unit
    bias_error       ‖b - c‖ / ‖[B c]‖             c the base's bias, as one more column of B

A layer is ranked by its factor: its error over the median of all layers of its encoding. Quantizing
one model with one recipe costs all layers about the same, so a layer that costs several times as
much was not quantized badly, it was read or written wrongly. Factors need a majority that is right;
`LOST` is the limit for a file in which everything is wrong alike. Biases are hardly ever quantized,
so theirs is a limit too.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import hypot, inf, log10
from os.path import commonprefix
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor, zeros

from diffquant.errors import DiffquantError, PlanError
from diffquant.pieces import dense
from diffquant.plan import ROW_MAJOR, LayerPlan, Layout, Part, Plan, Role
from diffquant.tensors import Weights

#: A layer's error may be this many times the median of its encoding.
FACTOR = 3.0
#: No encoding loses more than this part of a weight.
LOST = 0.5
#: What rounding, shifted inputs and making up for lost weights by the average input may cost a bias.
BIAS = 0.1
#: What storing a weight in bfloat16 once more may cost; errors below say nothing.
ROUNDING = 2.0**-8
#: Weights that are looked at together: what is computed of them stays in the cache.
CACHED = 1 << 17
#: Base layers a suspicious one is held against.
STRANGERS = 64
#: Suspicion of a layer that stayed dense though its like did not.
LEFT = "left unquantized"
LOW_FIRST, HIGH_FIRST = ROW_MAJOR, Layout("row_major", (("nibbles", "high"),))
ROWS, TILES = ROW_MAJOR, Layout("tiles_128x4")
#: Orders that are taken for one another: role, the order it was read in, the other, what that means.
ORDERS = (
    (Role.CODES, LOW_FIRST, HIGH_FIRST, "its half bytes are swapped"),
    (Role.CODES, HIGH_FIRST, LOW_FIRST, "its half bytes are swapped"),
    (Role.BLOCK_SCALE, TILES, ROWS, "its block scales lie in rows, not in tiles"),
    (Role.BLOCK_SCALE, ROWS, TILES, "its block scales lie in tiles, not in rows"),
)
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

#: layers done, layers in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """One decoded weight against its reference; see the head of this file for units."""

    relative_error: float
    sqnr_db: float
    max_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFidelity:
    """One layer of a comparison.

    fidelity   None where one side lacks the layer
    factor     its error over the median of its encoding
    suspicion  what may have happened to it, None when nothing did
    """

    path: str
    encoding: str
    fidelity: Fidelity | None
    bias_error: float = 0.0
    factor: float = 1.0
    suspicion: str | None = None

    def is_outlier(self, factor: float = FACTOR) -> bool:
        """Whether the layer is missing, lost, or worse than its like by more than `factor`."""
        if self.fidelity is None or self.bias_error > BIAS:
            return True
        return self.factor > factor or self.fidelity.relative_error > LOST

    def to_json(self) -> dict[str, Any]:
        """Stable keys; figures are null where a side lacks the layer or the value is infinite."""
        figures = self.fidelity
        return {
            "path": self.path,
            "encoding": self.encoding,
            "relative_error": None if figures is None else _finite(figures.relative_error),
            "sqnr_db": None if figures is None else _finite(figures.sqnr_db),
            "max_error": None if figures is None else _finite(figures.max_error),
            "bias_error": _finite(self.bias_error),
            "factor": _finite(self.factor),
            "suspicion": self.suspicion,
        }


def layer_fidelity(reference_NK: Tensor, decoded_NK: Tensor) -> Fidelity:
    """Figures of one weight. A value that is not finite makes every figure infinitely bad.

    Raises PlanError when the shapes differ.
    """
    if reference_NK.shape != decoded_NK.shape:
        raise PlanError(
            f"a weight of shape {list(decoded_NK.shape)} is held against one of "
            f"{list(reference_NK.shape)}",
            hint="--base names the model that was quantized",
        )
    running = Running()
    running.add(reference_NK, decoded_NK)
    return running.figures()


class Running:
    """Figures of one weight that is looked at in parts, so that no whole copy of it is needed."""

    def __init__(self) -> None:
        self._signal = self._noise = self._most = 0.0

    def add(self, reference_NK: Tensor, decoded_NK: Tensor) -> None:
        """Some of its rows, before and after."""
        rows = max(1, CACHED // max(1, reference_NK[:1].numel()))
        for reference, decoded in zip(
            reference_NK.split(rows), decoded_NK.split(rows), strict=True
        ):
            self._add(reference, decoded)

    def _add(self, reference_NK: Tensor, decoded_NK: Tensor) -> None:
        reference = reference_NK.float()
        difference = decoded_NK.float() - reference
        self._signal = hypot(self._signal, float(reference.norm()))
        self._noise = hypot(self._noise, float(difference.norm()))
        low, high = difference.aminmax()
        self._most = max(self._most, -float(low), float(high))

    def figures(self) -> Fidelity:
        """What all parts together lost."""
        signal, noise = self._signal, self._noise
        if not noise < inf:
            return Fidelity(relative_error=inf, sqnr_db=-inf, max_error=inf)
        if noise == 0.0:
            return Fidelity(relative_error=0.0, sqnr_db=inf, max_error=0.0)
        return Fidelity(
            relative_error=noise / signal if signal else inf,
            sqnr_db=20 * log10(signal / noise) if signal else -inf,
            max_error=self._most,
        )


def compare_plans(
    plan: Plan, base_plan: Plan, on_layer: Progress | None = None
) -> tuple[LayerFidelity, ...]:
    """Every linear of both plans, the worst first; few dense layers in memory at a time.

    plan  settled: with an open question its layers have no certain weight

    Raises PlanError when the two are of different shapes.
    """
    assert not plan.open, "settle the plan first"
    ours, base = _Side(plan), _Side(base_plan)
    measured = [
        _measured(layer, ours, base, done, on_layer) for done, layer in enumerate(plan.layers, 1)
    ]
    measured += [
        LayerFidelity(path=path, encoding="-", fidelity=None, suspicion="missing")
        for path in base.layers
        if path not in ours.layers
    ]
    ranking = ranked(measured)
    plain = frozenset(_left_plain(plan))
    return tuple(replace(each, suspicion=_suspicion(each, ours, base, plain)) for each in ranking)


class _Side:
    """The layers of one plan and their dense weights."""

    def __init__(self, plan: Plan) -> None:
        self.layers: Mapping[str, LayerPlan] = {layer.path: layer for layer in plan.layers}
        self._weights = Weights([Path(file.path) for file in plan.files])

    def linear(self, path: str) -> tuple[Tensor, Tensor]:
        """Weight [N, K] and bias [N], zeros where there is none."""
        return self.read(self.layers[path])

    def read(self, layer: LayerPlan) -> tuple[Tensor, Tensor]:
        """The same of a layer that is planned otherwise."""
        weight, bias = dense(layer, self._weights)
        return weight, zeros(len(weight)) if bias is None else bias

    def weight(self, path: str) -> Tensor:
        return self.linear(path)[0]


def _measured(
    layer: LayerPlan, ours: _Side, base: _Side, done: int, on_layer: Progress | None
) -> LayerFidelity:
    found, bias_error = None, 0.0
    if layer.path in base.layers:
        weight, bias = ours.linear(layer.path)
        truth, its_bias = base.linear(layer.path)
        found = layer_fidelity(truth, weight)
        whole = hypot(float(truth.norm()), float(its_bias.norm()))
        bias_error = float((bias - its_bias).norm()) / whole if whole else 0.0
    if on_layer is not None:
        on_layer(done, len(ours.layers))
    return LayerFidelity(
        path=layer.path,
        encoding="+".join(layer.encodings),
        fidelity=found,
        bias_error=bias_error,
    )


def ranked(measured: Sequence[LayerFidelity]) -> list[LayerFidelity]:
    """With factors, the worst first; layers that one side lacks lead."""
    errors: dict[str, list[float]] = defaultdict(list)
    for each in measured:
        if each.fidelity is not None:
            errors[each.encoding].append(each.fidelity.relative_error)
    usual = {encoding: max(median(found), ROUNDING) for encoding, found in errors.items()}
    judged = (
        replace(each, factor=each.fidelity.relative_error / usual[each.encoding])
        if each.fidelity is not None
        else replace(each, factor=inf)
        for each in measured
    )
    return sorted(judged, key=lambda each: -each.factor)


# suspicions --------------------------------------------------------------------------------------


def _suspicion(each: LayerFidelity, ours: _Side, base: _Side, plain: frozenset[str]) -> str | None:
    """What an outlier looks like, and what was left out though its like were not."""
    if each.path not in base.layers:
        return "not in the base"
    if each.fidelity is None:
        return "missing"
    if each.path in plain:
        return LEFT
    if not each.is_outlier():
        return None
    found, truth = ours.weight(each.path), base.weight(each.path)
    # What explains an error leaves at most half of it.
    limit = min(each.fidelity.relative_error, LOST) / 2
    return (
        _exchanged(each.path, found, base, limit)
        or _halved(found, truth, limit)
        or _rescaled(found, truth, limit)
        or _reordered(each.path, truth, ours, limit)
        or _different(each)
    )


def _exchanged(path: str, found: Tensor, base: _Side, limit: float) -> str | None:
    """Another layer of the base that the weight is much nearer to than to its own."""
    for other in islice(_strangers(path, base), STRANGERS):
        if layer_fidelity(base.weight(other), found).relative_error < limit:
            return f"{_told(path, other)} exchanged? it matches {other!r} of the base"
    return None


def _halved(found: Tensor, truth: Tensor, limit: float) -> str | None:
    """Whether its first half of rows is the base's second one, and the other way round."""
    swapped = truth.roll(len(truth) // 2, 0)
    if layer_fidelity(swapped, found).relative_error < limit:
        return "its halves are exchanged: shift and scale?"
    return None


def _rescaled(found: Tensor, truth: Tensor, limit: float) -> str | None:
    """Whether one factor per row or per column explains the error."""
    rests = {name: _unscaled(found, truth, axis) for axis, name in ((1, "rows"), (0, "columns"))}
    name = min(rests, key=rests.__getitem__)
    told = f"{name} are scaled: a scale dropped, divided, or smoothing left in it?"
    return told if rests[name] < limit else None


def _reordered(path: str, truth: Tensor, ours: _Side, limit: float) -> str | None:
    """Whether it would be the base's, had one part been read in another order."""
    for role, held, other, said in ORDERS:
        layer = _with_layout(ours.layers[path], role, held, other)
        if layer == ours.layers[path]:
            continue
        try:
            weight, _ = ours.read(layer)
        except DiffquantError:
            continue  # the part has no such shape
        if layer_fidelity(truth, weight).relative_error < limit:
            return said
    return None


def _with_layout(layer: LayerPlan, role: Role, held: Layout, other: Layout) -> LayerPlan:
    def part(each: Part) -> Part:
        return replace(each, layout=other) if (each.role, each.layout) == (role, held) else each

    pieces = (replace(piece, parts=tuple(map(part, piece.parts))) for piece in layer.pieces)
    return replace(layer, pieces=tuple(pieces))


def _unscaled(found: Tensor, truth: Tensor, axis: int) -> float:
    """The error that the best factor for every line along an axis leaves."""
    factors = (found * truth).sum(axis, keepdim=True)
    factors = factors / truth.square().sum(axis, keepdim=True).clamp(min=1e-30)
    return layer_fidelity(truth * factors, found).relative_error


def _different(each: LayerFidelity) -> str | None:
    if each.bias_error > BIAS:
        return "the bias is not the base's: a shift or an added 1 forgotten?"
    is_lost = each.fidelity is not None and each.fidelity.relative_error > LOST
    return "the weight is not the base's" if is_lost else None


def _strangers(path: str, base: _Side) -> Iterator[str]:
    """Layers of the same shape, those of the same block first."""
    shape = base.layers[path].shape_NK
    others = (
        other for other, layer in base.layers.items() if other != path and layer.shape_NK == shape
    )
    return iter(sorted(others, key=lambda other: -len(commonprefix([path, other]))))


def _told(path: str, other: str) -> str:
    """`q and k` for siblings, else where the two lie."""
    prefix, _, name = path.rpartition(".")
    other_prefix, _, other_name = other.rpartition(".")
    if prefix == other_prefix:
        return f"{name.removeprefix('to_')} and {other_name.removeprefix('to_')}"
    return f"{path!r} and {other!r}"


def _left_plain(plan: Plan) -> Iterator[str]:
    """Dense layers of a kind that is quantized in most blocks."""
    narrow = {layer.path for layer in plan.quantized}
    total = Counter(_kind(layer.path) for layer in plan.layers)
    quantized = Counter(_kind(path) for path in narrow)
    for layer in plan.layers:
        name = _kind(layer.path)
        if layer.path not in narrow and 2 * quantized[name] > total[name]:
            yield layer.path


def _kind(path: str) -> str:
    """The path with its block numbers blanked."""
    return NUMBER.sub("#", path)


def _finite(value: float) -> float | None:
    return value if -inf < value < inf else None
