"""Answers to a plan's open questions, from data: Plan -> Plan.

Questions of one topic are answered together: candidate i gives every part its i-th layout. Layers
are tried in every candidate, the smallest first, until three of them have spoken; they are judged by
the best witness there is:

    the base   error of the decoded weight against the BF16 weight, ‖W - B‖ / ‖B‖. A right reading of
               4 bits is near 0.1; a layer that no candidate explains says nothing (smoothing may have
               been moved into it), and those that speak must agree
    codes      share of groups whose largest code is not of the largest magnitude. Scales are taken
               from the largest weight of a group, so a right reading has almost none; a wrong one
               mixes groups and has every seventh
    scales     share of the variance of log2(scale) that rows and columns do not explain. Trained
               weights have large and small rows and columns, and a wrong order scatters them; random
               weights have neither, and nothing is answered

Where no candidate is clearly better the plan is refused with both figures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, isfinite, uint8, zeros_like

from diffquant import headers, planner
from diffquant.encodings import ENCODINGS
from diffquant.errors import PlanError
from diffquant.formats.diffusers import trace
from diffquant.pieces import canonical, dense
from diffquant.plan import LayerPlan, Part, Piece, Plan, Question, Role
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights

Base = Callable[[str], Tensor | None]

#: Layers that must have spoken, and layers that are asked at most.
VOTES, SAMPLES = 3, 12
#: Codes whose magnitude no other code of the encoding exceeds, sign bit included.
LARGEST_CODES: Mapping[str, frozenset[int]] = {
    "int4": frozenset({7, 8, 9}),  # -8 and -7 as two's complement
    "nvfp4": frozenset({7, 15}),
    "mxfp4": frozenset(
        {6, 7, 14, 15}
    ),  # scales are powers of two: the largest value rounds to 4 or 6
}
HINTS: Mapping[str, str] = {
    "scale layout": "--scale-layout linear|tiles",
    "nibble order": "--nvfp4-nibbles low|high",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """Something data can say about a candidate: one figure per layer, smaller is better.

    limit   a right reading stays below it
    clear   the next candidate's figure is at least this many times the winner's
    """

    name: str
    limit: float
    clear: float
    figure: Callable[[LayerPlan, Weights], float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The winning candidate and the sentence that says why."""

    candidate: int
    why: str


def settle(plan: Plan, base: Base | None = None) -> Plan:
    """The plan with every open question answered; the answer is noted in each layer's `why`.

    base   dense weight [N, K] of the unquantized model by module path, None for paths it lacks

    Raises PlanError where the data does not tell.
    """
    if not plan.open:
        return plan
    weights = Weights([Path(file.path) for file in plan.files])
    settled = plan
    for topic in dict.fromkeys(question.topic for question in plan.open):
        questions = [question for question in plan.open if question.topic == topic]
        verdict = _decided(settled, questions, weights, base)
        settled = _answered(settled, questions, verdict)
    return replace(settled, open=())


def of_checkpoint(base: Checkpoint | None, config: Mapping[str, Any]) -> Base | None:
    """The dense weights of a base component to judge by; None where it has none, or quantized ones."""
    if base is None or not base.files:
        return None
    header = headers.read(base.files)
    return None if trace(header) else of_plan(planner.plan(base, header, config=config))


def of_plan(plan: Plan) -> Base:
    """The dense weights of a plan, as a base to judge by."""
    weights = Weights([Path(file.path) for file in plan.files])
    layers = {layer.path: layer for layer in plan.layers}

    def weight(path: str) -> Tensor | None:
        return dense(layers[path], weights)[0] if path in layers else None

    return weight


def _decided(
    plan: Plan, questions: Sequence[Question], weights: Weights, base: Base | None
) -> Verdict:
    """The candidate that the first witness able to tell names. Raises PlanError when none is."""
    samples = _samples(plan, questions)
    heard = []
    for witness in _witnesses(questions, base):
        figures = _heard(witness, samples, questions, weights)
        verdict = _verdict(witness, figures, questions)
        if verdict is not None:
            return verdict
        heard.append(f"{witness.name} {_listed(_means(figures), questions)}")
    topic, count = questions[0].topic, len(_paths(questions))
    raise PlanError(
        f"the {topic} of {count} layers cannot be told ({questions[0].why}): "
        + ("; ".join(heard) or "nothing stored speaks of it"),
        hint=f"say it with {HINTS[topic]}" if topic in HINTS else "give the base with --model-path",
    )


def _heard(
    witness: Witness, samples: Sequence[LayerPlan], questions: Sequence[Question], weights: Weights
) -> list[list[float]]:
    """Figures [layer][candidate], until enough layers were clear."""
    rows: list[list[float]] = []
    for layer in samples:
        rows.append(
            [_figure(witness, layer, questions, index, weights) for index in _candidates(questions)]
        )
        if sum(_is_clear(witness, row) for row in rows) == VOTES:
            break
    return rows


def _witnesses(questions: Sequence[Question], base: Base | None) -> Iterator[Witness]:
    if base is not None:
        yield Witness(name="error against the base", limit=0.25, clear=1.1, figure=_against(base))
    roles = {question.role for question in questions}
    if Role.CODES in roles:
        yield Witness(
            name="share of groups without a largest code",
            limit=0.06,
            clear=2.0,
            figure=_without_largest,
        )
    elif Role.BLOCK_SCALE in roles:
        yield Witness(
            name="variance of scales that rows and columns leave",
            limit=0.95,
            clear=1.1,
            figure=_unexplained,
        )


def _verdict(
    witness: Witness, figures: Sequence[Sequence[float]], questions: Sequence[Question]
) -> Verdict | None:
    """Layers for which one candidate is good and clearly the best must agree; the others abstain."""
    votes = {
        min(range(len(row)), key=row.__getitem__) for row in figures if _is_clear(witness, row)
    }
    if len(votes) != 1:
        return None
    winner = votes.pop()
    listed = _listed(_means([row for row in figures if _is_clear(witness, row)]), questions)
    return Verdict(winner, f"{questions[0].topic} by {witness.name}: {listed}")


def _is_clear(witness: Witness, row: Sequence[float]) -> bool:
    best, following = sorted(row)[:2]
    return best < witness.limit and following > witness.clear * best and following - best > 0.01


def _figure(
    witness: Witness, layer: LayerPlan, questions: Sequence[Question], index: int, weights: Weights
) -> float:
    """Infinite where the stored sizes cannot be read that way at all."""
    try:
        return witness.figure(_relaid(layer, questions, index), weights)
    except PlanError:
        return float("inf")


# witnesses -----------------------------------------------------------------------------------


def _against(base: Base) -> Callable[[LayerPlan, Weights], float]:
    def error(layer: LayerPlan, weights: Weights) -> float:
        truth = base(layer.path)
        if truth is None or tuple(truth.shape) != layer.shape_NK:
            return float("inf")
        found = dense(layer, weights)[0]
        ratio = (found - truth.float()).norm() / truth.float().norm()
        return float(ratio) if isfinite(ratio) else float("inf")

    return error


def _without_largest(layer: LayerPlan, weights: Weights) -> float:
    """Share of groups, of those with a code that is not zero, without a code of largest magnitude."""
    without, total = 0, 0
    for piece in layer.pieces:
        group = _group(piece)
        if group is None or piece.encoding.name not in LARGEST_CODES:
            continue
        codes = canonical(piece, weights)[Role.CODES].view(uint8)
        groups = codes[:, : codes.shape[1] * 2 // group * group // 2].reshape(-1, group // 2)
        largest = zeros_like(groups, dtype=bool)  # type: ignore[arg-type]
        for code in LARGEST_CODES[piece.encoding.name]:
            largest |= ((groups & 15) == code) | ((groups >> 4) == code)
        used = groups.any(1)
        without += int((used & ~largest.any(1)).sum())
        total += int(used.sum())
    return without / total if total else float("inf")


def _unexplained(layer: LayerPlan, weights: Weights) -> float:
    """Residual over total mean square of log2(scale) after fitting row and column means."""
    figures = []
    for piece in layer.pieces:
        if piece.part(Role.BLOCK_SCALE) is None:
            continue
        scale_NG = canonical(piece, weights)[Role.BLOCK_SCALE]
        # scales stored as bytes are exponents already
        log_NG = scale_NG.float()
        if scale_NG.is_floating_point():
            log_NG = log_NG.clamp(min=2.0**-9).log2()
        n, g = log_NG.shape
        if n < 2 or g < 2:
            continue
        centred = log_NG - log_NG.mean()
        rest = centred - centred.mean(1, keepdim=True) - centred.mean(0, keepdim=True)
        spread = centred.square().sum() / (n * g - 1)
        if spread > 0:
            figures.append(float(rest.square().sum() / ((n - 1) * (g - 1)) / spread))
    return sum(figures) / len(figures) if figures else float("inf")


def _group(piece: Piece) -> int | None:
    """Columns per block scale."""
    default = ENCODINGS.load(piece.encoding.name).group
    named = piece.encoding.option("block", "") or piece.encoding.option("group", "")
    return int(named) if named else default


# plans ---------------------------------------------------------------------------------------


def _samples(plan: Plan, questions: Sequence[Question]) -> list[LayerPlan]:
    """The smallest layers the questions speak of, of different kinds before of the same."""
    paths = _paths(questions)
    layers = sorted(
        (layer for layer in plan.layers if layer.path in paths),
        key=lambda layer: layer.shape_NK[0] * layer.shape_NK[1],
    )
    kinds: dict[str, LayerPlan] = {}
    for layer in layers:
        kinds.setdefault(layer.path.rpartition(".")[2], layer)
    distinct = list(kinds.values())
    return (distinct + [layer for layer in layers if layer not in distinct])[:SAMPLES]


def _answered(plan: Plan, questions: Sequence[Question], verdict: Verdict) -> Plan:
    paths = _paths(questions)
    layers = (
        replace(_relaid(layer, questions, verdict.candidate), why=f"{layer.why}; {verdict.why}")
        if layer.path in paths
        else layer
        for layer in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def _relaid(layer: LayerPlan, questions: Sequence[Question], index: int) -> LayerPlan:
    """The layer with the asked parts in the index-th layout."""
    asked = {question.role: question for question in questions if layer.path in question.paths}

    def relaid(part: Part) -> Part:
        question = asked.get(part.role)
        if question is None or part.layout not in question.layouts:
            return part
        return replace(part, layout=question.layouts[index])

    pieces = (
        replace(piece, parts=tuple(relaid(part) for part in piece.parts)) for piece in layer.pieces
    )
    return replace(layer, pieces=tuple(pieces))


def _paths(questions: Sequence[Question]) -> frozenset[str]:
    return frozenset(path for question in questions for path in question.paths)


def _candidates(questions: Sequence[Question]) -> range:
    return range(len(questions[0].layouts))


def _means(figures: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*figures, strict=True)]


def _listed(means: Sequence[float], questions: Sequence[Question]) -> str:
    pairs = zip(questions[0].layouts, means, strict=True)
    return ", ".join(f"{layout} {mean:.3g}" for layout, mean in pairs)
