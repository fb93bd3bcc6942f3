"""How much of a model's error is one layer's: layers take turns at being quantized.

The dense transformer draws first and leaves questions: what it was asked, and what it answered. Then
it is asked again with some of its linears exchanged for those of its quantized twin. Errors do not
compound, because the questions never change.

    error   root mean square over the questions of ‖difference‖ / ‖reference answer‖

Layers that are stored together (one weight, or one tensor scale for several) change together: they
are a unit. Host memory: the dense pipeline and the encoded transformer, side by side.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from torch import Tensor, nn

from diffquant import patterns
from diffquant.compare.cost import weight_bytes
from diffquant.compare.metrics import distance, likeness, per_step
from diffquant.compare.trajectory import Call, Trajectory, ask, follow, recorded
from diffquant.errors import UsageError
from diffquant.families import FAMILIES, Family
from diffquant.plan import LayerPlan, Plan
from diffquant.run import Request

#: layers done, layers in all
Progress = Callable[[int, int], None]
#: Kinds of layers, in the order they are looked for.
KINDS = ("modulation", "attention", "feed-forward", "embedding and output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Layers that can only be quantized together; mostly one.

    kind                one of KINDS
    wide_bytes, bytes   of weight and bias before and after
    sensitive           the family keeps it dense whatever a preset says
    """

    paths: tuple[str, ...]
    kind: str
    wide_bytes: int
    bytes: int
    sensitive: bool

    @property
    def saved(self) -> int:
        """Bytes that quantizing it saves."""
        return self.wide_bytes - self.bytes


@dataclass(frozen=True, slots=True)
class Questions:
    """What a dense model was asked and answered, and what it drew meanwhile."""

    calls: tuple[Call, ...]
    blobs: Mapping[str, Tensor]
    drawings: tuple[Trajectory, ...]

    @staticmethod
    def of(
        pipeline: Any, component: str, requests: Sequence[Request], steps: int, tell: Progress
    ) -> "Questions":
        """Draw every request, and keep `steps` calls of the component from each, evenly spread.

        Raises UsageError for a component that drawing does not call.
        """
        calls: list[Call] = []
        drawings = []
        with recorded({component: getattr(pipeline, component)}) as recorder:
            for done, request in enumerate(requests, start=1):
                before = len(recorder.calls)
                drawings.append(follow(pipeline, request, lambda step: None))
                calls += _spread(recorder.calls[before:], steps)
                tell(done, len(requests))
        if not calls:
            raise UsageError(f"drawing does not call {component!r}")
        return Questions(tuple(calls), recorder.blobs, tuple(drawings))


class Exchange:
    """A dense transformer in which linears of its quantized twin can stand in for its own."""

    def __init__(self, dense: nn.Module, twin: nn.Module, plan: Plan) -> None:
        """`plan` is the twin's."""
        self.module = dense
        self.units = tuple(_units(dense, twin, plan))
        paths = [path for unit in self.units for path in unit.paths]
        self._quantized = {path: twin.get_submodule(path) for path in paths}
        self._wide_bytes = weight_bytes([dense])

    def bytes(self, quantized: Iterable[Unit]) -> int:
        """Of the whole transformer with these units quantized."""
        return self._wide_bytes - sum(unit.saved for unit in quantized)

    @contextmanager
    def quantizing(self, units: Iterable[Unit]) -> Iterator[None]:
        """With these units quantized and all others dense."""
        paths = [path for unit in units for path in unit.paths]
        own = {path: self.module.get_submodule(path) for path in paths}
        self._put({path: self._quantized[path] for path in paths})
        try:
            yield
        finally:
            self._put(own)

    def error(self, units: Iterable[Unit], questions: Questions) -> float:
        """Of the answers with these units quantized; infinite where one is not finite."""
        device = next(self.module.parameters()).device
        with self.quantizing(units):
            answers = [ask(self.module, call, questions.blobs, device) for call in questions.calls]
        squares = [
            distance(questions.blobs[call.output], answer).relative_l2 ** 2
            for call, answer in zip(questions.calls, answers, strict=True)
        ]
        mean = sum(squares) / len(squares)
        return mean**0.5 if isfinite(mean) else inf

    def figures(
        self, units: Iterable[Unit], questions: Questions, pipeline: Any
    ) -> dict[str, float | None]:
        """What `verdict.judge` takes: everything drawn once more, against the dense drawings."""
        with self.quantizing(units):
            drawn = [
                follow(pipeline, drawing.request, lambda step: None)
                for drawing in questions.drawings
            ]
        pairs = list(zip(questions.drawings, drawn, strict=True))
        last = [per_step(tuple(ours.latents), tuple(theirs.latents))[-1] for ours, theirs in pairs]
        alike = [likeness(ours.frames, theirs.frames) for ours, theirs in pairs]
        return {
            "psnr": _mean(each.psnr_db for each in alike),
            "mae": _mean(each.mae for each in alike),
            "cosine": _mean(each.cosine for each in last),
            "relative_l2": _mean(each.relative_l2 for each in last),
            "ssim": _mean(each.ssim for each in alike),
        }

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for path, module in modules.items():
            self.module.set_submodule(path, module, strict=True)


# -------------------------------------------------------------------------------------------- units


def _units(dense: nn.Module, twin: nn.Module, plan: Plan) -> Iterator[Unit]:
    family = FAMILIES.load(plan.family)
    paths = [layer.path for layer in plan.layers]
    kinds = _kinds(family, paths)
    sensitive = {path for each in family.sensitive for path in patterns.select(each, paths)}
    for members in _together([layer for layer in plan.layers if _is_recoded(layer)]):
        yield Unit(
            paths=members,
            kind=kinds[members[0]],
            wide_bytes=weight_bytes(dense.get_submodule(path) for path in members),
            bytes=weight_bytes(twin.get_submodule(path) for path in members),
            sensitive=any(path in sensitive for path in members),
        )


def _kinds(family: Family, paths: Sequence[str]) -> dict[str, str]:
    known = (tuple(family.chunked), family.attention, family.mlp, ("**",))
    found: dict[str, str] = {}
    for kind, named in zip(KINDS, known, strict=True):
        for path in (path for each in named for path in patterns.select(each, paths)):
            found.setdefault(path, kind)
    return found


def _together(layers: Sequence[LayerPlan]) -> Iterator[tuple[str, ...]]:
    """Paths by what they share; a layer that shares nothing is alone."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(_shares(layer) or layer.path, []).append(layer.path)
    yield from map(tuple, groups.values())


def _shares(layer: LayerPlan) -> str | None:
    recodes = [piece.recode for piece in layer.pieces if piece.recode is not None]
    return next((each.fused or each.shared_amax for each in recodes), None)


def _is_recoded(layer: LayerPlan) -> bool:
    return any(piece.recode is not None for piece in layer.pieces)


# ---------------------------------------------------------------------------------------- questions


def _spread(calls: Sequence[Call], count: int) -> list[Call]:
    """At most `count` of them, the middles of equal stretches."""
    few = min(count, len(calls))
    return [calls[(2 * index + 1) * len(calls) // (2 * few)] for index in range(few)]


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)
