"""What measuring every layer found, and the three ways it is told: preset, plot, figures."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffquant.compare import budget as budgets
from diffquant.compare.alone import KINDS, Unit
from diffquant.compare.budget import Budget
from diffquant.compare.chart import Chart, Point
from diffquant.compare.verdict import LEVELS, judge
from diffquant.kernels import Numerics
from diffquant.loading import DTYPES
from diffquant.run import DEFAULT_SEED, Request

#: For whoever names none.
PROMPTS = ("red apple", "fox face", "rocket", "birthday cake")
#: Calls of the model that are kept from each drawing.
STEPS = 4
#: Layers in the table.
WORST = 10
#: Layers that are named in the plot.
NAMED = 2
MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is measured, and on what.

    encoding  a value of --quantization
    keep_sensitive  layers that the family calls sensitive stay, whatever is measured
    steps     calls of the model kept from each drawing
    settings  size and steps of the drawings; what is open is the model's own
    """

    source: str
    encoding: str
    prompts: tuple[str, ...] = PROMPTS
    steps: int = STEPS
    seed: int = DEFAULT_SEED
    settings: Request = Request()
    component: str = "transformer"
    numerics: Numerics = "faithful"
    device: str | None = None
    dtype: str = "bfloat16"
    keep_sensitive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One point of the curve: the error and the bytes with the first units of the order kept.

    unit  the last of them; None where all that may be is quantized
    """

    kept: int
    bytes: int
    error: float
    unit: Unit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What was measured and chosen.

    scheme      the module of `schemes/` the encoding stands for
    alone       every unit with the error it makes alone, the worst first
    curve       from everything quantized to everything dense
    kept        the units that stay dense to meet the budget
    error       one-step error with those kept, measured; likewise bytes and figures of the drawings
    everything  one-step error with every layer quantized, sensitive ones too
    """

    wish: Wish
    family: str
    scheme: str
    budget: Budget
    alone: tuple[tuple[Unit, float], ...]
    curve: tuple[Place, ...]
    kept: tuple[Unit, ...]
    error: float
    everything: float
    bytes: int
    wide_bytes: int
    figures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that the drawings keep."""
        return tuple(name for name in LEVELS if judge(name, {}, self.figures).ok)

    def preset(self) -> str:
        """TOML of the schema of `presets/`."""
        errors = dict(self.alone)
        name = Path(self.wish.source).name
        head = [
            *(f"# {line}" for line in self._story()),
            "",
            f"family = {_quoted(self.family)}",
            f"algorithms = [{_quoted(self.scheme)}]",
            f"models = [{_quoted(name)}]",
            *([] if self.wish.keep_sensitive else ["complete = true"]),
        ]
        kept = sorted(self.kept, key=lambda unit: -errors[unit])
        return "\n".join([*head, *(self._rule(unit, errors[unit]) for unit in kept)]) + "\n"

    def chart(self) -> Chart:
        """Error against bytes: every point is a set of layers, coloured by the one it keeps more."""
        return Chart(
            title=f"{Path(self.wish.source).name} to {self.scheme}: what keeping layers costs and brings",
            x=f"{self.wish.component}, MB",
            y="one-step error (relative L2)",
            points=(*self._points(), self._chosen()),
            is_line=True,
            limit=(str(self.budget), self.budget.most)
            if isinstance(self.budget, budgets.ErrorBudget)
            else None,
        )

    def to_json(self) -> dict[str, Any]:
        kept = set(self.kept)
        return {
            "model": self.wish.source,
            "component": self.wish.component,
            "family": self.family,
            "encoding": self.scheme,
            "numerics": self.wish.numerics,
            "prompts": list(self.wish.prompts),
            "steps_per_prompt": self.wish.steps,
            "seed": self.wish.seed,
            "budget": str(self.budget),
            "one_step_error": self.error,
            "one_step_error_all_quantized": self.everything,
            "bytes": self.bytes,
            "dense_bytes": self.wide_bytes,
            "drawings": {**self.figures, "levels": list(self.levels)},
            "layers": [
                {
                    "paths": list(unit.paths),
                    "kind": unit.kind,
                    "error_alone": error,
                    "saved_bytes": unit.saved,
                    "sensitive": unit.sensitive,
                    "kept": unit in kept,
                }
                for unit, error in self.alone
            ],
            "curve": [
                {"kept": place.kept, "bytes": place.bytes, "one_step_error": place.error}
                for place in self.curve
            ],
        }

    def table(self) -> str:
        """The most sensitive layers, for people."""
        kept = set(self.kept)
        rows = [
            (
                _short(unit),
                unit.kind,
                f"{error:.4f}",
                f"{unit.saved / MB:.3f} MB",
                "stays" if unit in kept else "",
            )
            for unit, error in self.alone[:WORST]
        ]
        return _table([("most sensitive layers", "kind", "alone", "saves", ""), *rows])

    def told(self) -> str:
        """The result in a few lines."""
        layers = sum(len(unit.paths) for unit, _ in self.alone)
        stay = sum(len(unit.paths) for unit in self.kept)
        drawn = ", ".join(
            f"{title} {self.figures[name]:.{digits}f}"
            for name, title, digits in (("psnr", "PSNR", 1), ("ssim", "SSIM", 3))
        )
        keeps = " and ".join(self.levels) or "no level"
        return "\n".join(
            [
                f"{stay} of {layers} layers stay {DTYPES[self.wish.dtype]}, the others are {self.scheme}",
                f"one-step error {self.error:.4f}, with all quantized {self.everything:.4f}",
                f"{self.bytes / MB:.2f} MB of {self.wide_bytes / MB:.2f} MB ({self.budget} was asked)",
                f"drawings: {drawn}; {keeps} kept",
            ]
        )

    def _story(self) -> Iterator[str]:
        wish = self.wish
        yield f"Measured on {len(wish.prompts)} prompts, {wish.steps} steps of each, {wish.numerics} numerics."
        yield (
            f"With these layers kept: one-step error {self.error:.4f}, {self.bytes / MB:.2f} MB "
            f"of {self.wide_bytes / MB:.2f} MB."
        )
        yield f"The budget was {self.budget}. With every layer quantized the error is {self.everything:.4f}."

    def _rule(self, unit: Unit, error: float) -> str:
        patterns = ", ".join(map(_quoted, unit.paths))
        measured = f"measured: relative L2 {error:.3g} when quantized alone"
        always = unit.sensitive and self.wish.keep_sensitive
        why = f"{measured}; the family calls it sensitive" if always else measured
        source = f"diffquant convert sensitivity --encoding {self.scheme}"
        return (
            f"\n[[keep]]\npatterns = [{patterns}]\nreason = {_quoted(why)}\n"
            f"source = {_quoted(source)}"
        )

    def _points(self) -> Iterator[Point]:
        for place in self.curve:
            kind = KINDS[-1] if place.unit is None else place.unit.kind
            yield Point(x=place.bytes / MB, y=place.error, kind=kind, name=self._name(place))

    def _name(self, place: Place) -> str:
        if place is self.curve[0]:
            told = "all quantized"
            return f"{told} but what the family keeps" if self.wish.keep_sensitive else told
        if place is self.curve[-1]:
            return "all dense"
        worst = [unit for unit, _ in self.alone[:NAMED]]
        return f"{_short(place.unit)} stays" if place.unit and place.unit in worst else ""

    def _chosen(self) -> Point:
        kind = self.kept[-1].kind if self.kept else KINDS[-1]
        name = f"chosen: {self.bytes / MB:.2f} MB, error {self.error:.3g}"
        return Point(x=self.bytes / MB, y=self.error, kind=kind, name=name, is_marked=True)


def _quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _short(unit: Unit) -> str:
    """The first layer's path, and what the others have instead of its last segment."""
    first, *others = unit.paths
    return ", ".join([first, *(path.rpartition(".")[2] for path in others)])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
